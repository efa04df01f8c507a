"""Gated positional self-attention: every head weighs what its content asks for against a place to look at.

Paper: d'Ascoli et al., ConViT, https://arxiv.org/abs/2103.10697. What differs: the positional scores are a sum of a
function of the row and one of the column, so their softmax over the map is the product of two small ones; it is applied
as two matrix products along the axes instead of one over all pairs of tokens, and the content's share is plain
attention. Both shares sum to one, so that the paper's normalisation of the rows has nothing left to do.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.cases import Case, Raises

__all__ = ["GatedPositionalSelfAttention", "attention_distance"]


def attention_distance(attention: Tensor, height: int, width: int) -> Tensor:
    r"""Return how far each head looks on average, the paper's non-locality, in tokens.

    .. math:: D_h = \frac{1}{N L} \sum_{n,i,j} A_{nhij} \|\delta_{ij}\|

    Args:
        attention: maps (N, heads, L, L) of a grid of tokens, row by row; every row sums to one.
        height: of the grid.
        width: of the grid.

    Shapes:
        - output: (heads,)
    """
    y, x = torch.meshgrid(*(torch.arange(n, device=attention.device) for n in (height, width)), indexing="ij")
    places = torch.stack([y.flatten(), x.flatten()], 1).to(attention.dtype)
    return (attention * torch.cdist(places, places)).sum(-1).mean((0, 2))


class GatedPositionalSelfAttention(nn.Module):
    r"""Attention of `ConViT <https://arxiv.org/abs/2103.10697>`_ that starts as a convolution and may leave it.

    .. math:: A^h_{ij} = (1 - \sigma(\lambda_h))\, \mathrm{softmax}_j\Big(\frac{q_i^\top k_j}{\sqrt{d}}\Big)
        + \sigma(\lambda_h)\, \mathrm{softmax}_j\big(v_h^\top r_{ij}\big), \qquad
        r_{ij} = (\delta_x, \delta_y, \|\delta\|^2)

    where :math:`\delta` leads from token i to token j. It starts with :math:`\lambda = 1`, values as they come
    (:math:`W_V = 1`), and :math:`v_h = \alpha (2 c_x, 2 c_y, -1)`, so that head h looks at the offset :math:`c_h` of a
    :math:`\sqrt{H} \times \sqrt{H}` kernel, the more sharply the larger the locality strength :math:`\alpha`.

    Args:
        dim: features C of a token.
        num_heads: heads H, the square of a number; must divide `dim`.
        locality_strength: :math:`\alpha`.
        qkv_bias: add a bias to queries, keys and values.
        device, dtype: of the parameters.

    Shapes:
        - input and output: :math:`(N, H, W, C)`

    Raises:
        ValueError: if `num_heads` is no square or does not divide `dim`.
    """

    def __init__(
        self, dim: int, num_heads: int = 4, locality_strength: float = 1.0, qkv_bias: bool = False,
        *, device=None, dtype=None,
    ) -> None:  # fmt: skip
        super().__init__()
        if math.isqrt(num_heads) ** 2 != num_heads:
            raise ValueError(f"num_heads must be the square of a number: got {num_heads}")
        if dim % num_heads:
            raise ValueError(f"dim must be divisible by num_heads: got {dim} and {num_heads}")
        self.num_heads, self.locality_strength = num_heads, locality_strength
        self.qk = nn.Linear(dim, 2 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.v = nn.Linear(dim, dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.pos_proj = nn.Linear(3, num_heads, device=device, dtype=dtype)
        self.gating_param = nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new queries, keys and projection; values, positions and gates start as the convolution."""
        for layer in (self.qk, self.v, self.proj, self.pos_proj):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        self.start_as_convolution()

    @torch.no_grad()
    def start_as_convolution(self) -> None:
        """Set values, positions and gates to the convolutional start."""
        nn.init.eye_(self.v.weight)
        nn.init.ones_(self.gating_param)
        side = math.isqrt(self.num_heads)
        offset = torch.arange(side, device=self.v.weight.device) - (side - 1) / 2
        x, y = torch.meshgrid(offset, offset, indexing="ij")
        start = torch.stack([2 * x.flatten(), 2 * y.flatten(), -torch.ones(side**2, device=x.device)], 1)
        self.pos_proj.weight.copy_(self.locality_strength * start)

    def positional_attention(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Return the factors (heads, H, H) and (heads, W, W) of the attention to places."""
        across, down, square = self.pos_proj.weight[:, :, None, None].unbind(1)
        # The bias is among the public weights; every softmax cancels it.
        bias = self.pos_proj.bias[:, None, None]

        def axis(size: int, slope: Tensor) -> Tensor:
            place = torch.arange(size, device=slope.device, dtype=slope.dtype)
            step = place - place[:, None]
            return torch.softmax(slope * step + square * step**2 + bias, -1)

        return axis(height, down), axis(width, across)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries and keys (N, heads, H W, d), and values (N, heads, H, W, d)."""
        q, k = self.qk(x).flatten(1, 2).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, self.v(x).unflatten(-1, (self.num_heads, -1)).permute(0, 3, 1, 2, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Let the tokens of the map `x` attend to each other and to places."""
        height, width = x.shape[1:3]
        q, k, v = self.heads(x)
        rows, columns = self.positional_attention(height, width)
        content = F.scaled_dot_product_attention(q, k, v.flatten(2, 3)).unflatten(2, (height, width))
        local = torch.einsum("hij,nhjxd->nhixd", rows, torch.einsum("hij,nhyjd->nhyid", columns, v))
        gate = self.gating_param.sigmoid()[:, None, None, None]
        y = (1 - gate) * content + gate * local
        return self.proj(y.permute(0, 2, 3, 1, 4).flatten(3))

    def attention(self, x: Tensor) -> Tensor:
        """Return the attention maps (N, heads, H W, H W), of content and places together."""
        q, k, _ = self.heads(x)
        content = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1)
        rows, columns = self.positional_attention(*x.shape[1:3])
        local = torch.einsum("hij,hkl->hikjl", rows, columns).flatten(1, 2).flatten(2)
        gate = self.gating_param.sigmoid()[:, None, None]
        return (1 - gate) * content + gate * local


CASES = (
    Case(
        GatedPositionalSelfAttention,
        {"dim": 12, "num_heads": 4},
        inputs=((2, 5, 7, 12),),
        output=(2, 5, 7, 12),
        vary=(0, 1, 2),
        minimal=(1, 1, 1, 12),
        channels_last=False,
        raises=(
            Raises(ValueError, "num_heads must be the square of a number: got 6", {"num_heads": 6}),
            Raises(ValueError, "dim must be divisible by num_heads: got 12 and 9", {"num_heads": 9}),
        ),
    ),
)
