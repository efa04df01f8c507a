"""Multi-head self-attention, the token mixer of transformers.

Paper: Vaswani et al., Attention Is All You Need, https://arxiv.org/abs/1706.03762. Queries, keys and values come from
one linear layer, as in the public weights of vision transformers.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.cases import Case, Raises

__all__ = ["SelfAttention", "SelfAttention2d"]


class SelfAttention(nn.Module):
    r"""Multi-head self-attention of `Attention Is All You Need <https://arxiv.org/abs/1706.03762>`_.

    .. math:: y = W_O\, \mathrm{concat}_h\Big(\mathrm{softmax}\Big(\frac{Q_h K_h^\top}{\sqrt{d}}\Big) V_h\Big) + b_O

    with d = C / H features a head.

    Args:
        dim: features C of a token.
        num_heads: heads H; must divide `dim`.
        qkv_bias: add a bias to queries, keys and values.
        proj_bias: add the bias :math:`b_O`.
        device, dtype: of the parameters.

    Shapes:
        - input and output: :math:`(N, L, C)`

    Raises:
        ValueError: if `num_heads` does not divide `dim`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be divisible by num_heads: got {dim} and {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw new weights."""
        self.qkv.reset_parameters()
        self.proj.reset_parameters()

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return queries, keys and values (N, H, L, d) of tokens (N, L, C)."""
        # Widths are read from the weights: in a pruned layer values may have another than queries and keys.
        values = self.proj.in_features
        queries = (self.qkv.out_features - values) // 2
        parts = self.qkv(x).split((queries, queries, values), -1)
        return tuple(part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)

    def forward(self, x: Tensor) -> Tensor:
        """Let the tokens of `x` attend to each other."""
        q, k, v = self.heads(x)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2))

    def attention(self, x: Tensor) -> Tensor:
        """Return the attention maps (N, H, L, L); every row sums to one."""
        q, k, _ = self.heads(x)
        return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1)


class SelfAttention2d(SelfAttention):
    """Self-attention between the pixels of a map.

    Args:
        dim: channels C of the map.
        num_heads: heads; must divide `dim`.
        bias: add biases to queries, keys, values and outputs.
        device, dtype: of the parameters.

    Shapes:
        - input and output: :math:`(N, C, H, W)`

    Raises:
        ValueError: if `num_heads` does not divide `dim`.
    """

    def __init__(self, dim: int, num_heads: int = 8, bias: bool = True, *, device=None, dtype=None) -> None:
        super().__init__(dim, num_heads, bias, bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Let the pixels of `x` attend to each other."""
        tokens = super().forward(x.flatten(2).transpose(1, 2))
        return tokens.transpose(1, 2).unflatten(2, x.shape[2:])


CASES = (
    Case(
        SelfAttention,
        {"dim": 12, "num_heads": 3},
        inputs=((2, 7, 12),),
        output=(2, 7, 12),
        vary=(0, 1),
        minimal=(1, 1, 12),
        raises=(Raises(ValueError, "dim must be divisible by num_heads: got 12 and 5", {"num_heads": 5}),),
    ),
    Case(
        SelfAttention2d,
        {"dim": 12, "num_heads": 2, "bias": False},
        inputs=((2, 12, 3, 5),),
        output=(2, 12, 3, 5),
        minimal=(1, 12, 1, 1),
        raises=(Raises(ValueError, "dim must be divisible by num_heads: got 12 and 5", {"num_heads": 5}),),
    ),
)
