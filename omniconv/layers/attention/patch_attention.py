"""Attention of a map of tokens with a learned bias for every offset, and a margin of zero tokens to look at.

Papers: Shaw et al., Self-Attention with Relative Position Representations, https://arxiv.org/abs/1803.02155, which
clips far offsets; Li et al., Can Vision Transformers Perform Convolution?, https://arxiv.org/abs/2111.01353, whose
construction (`omniconv.inspect.theory.vit_conv`) is written into this layer: heads as wide as that needs, and zeros
beyond the border, as a convolution has them.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.cases import Case, Raises

__all__ = ["PatchAttention"]


class PatchAttention(nn.Module):
    r"""Multi-head attention with `relative positions <https://arxiv.org/abs/1803.02155>`_ on a map of tokens.

    .. math:: y_i = b + \sum_h \sum_j \mathrm{softmax}_j\Big(\frac{q_{hi}^\top k_{hj}}{\sqrt{d}} +
        B_{h, \delta(i, j)}\Big) W^O_h W^V_h x_j

    where j runs over the map and a margin of zeros, and the offset :math:`\delta(i, j)` from i to j is clipped to r + 1
    rows and columns.

    Args:
        in_features: of a token.
        out_features: of an output token.
        num_heads: heads h.
        head_dim: features of a head's values.
        key_dim: d, features of a head's queries and keys.
        reach: r, width of the margin; offsets up to here are told apart.
        device, dtype: of the parameters.

    Shapes:
        - input: :math:`(N, H, W, C)`
        - output: :math:`(N, H, W, C')`

    Raises:
        ValueError: if `reach` is negative.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_heads: int,
        *,
        head_dim: int,
        key_dim: int,
        reach: int = 1,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if reach < 0:
            raise ValueError(f"reach must not be negative: got {reach}")
        self.num_heads, self.reach = num_heads, reach
        to: dict[str, Any] = {"device": device, "dtype": dtype}
        self.query = nn.Linear(in_features, num_heads * key_dim, bias=False, **to)
        self.key = nn.Linear(in_features, num_heads * key_dim, bias=False, **to)
        self.value = nn.Linear(in_features, num_heads * head_dim, bias=False, **to)
        self.proj = nn.Linear(num_heads * head_dim, out_features, **to)
        self.position = nn.Parameter(torch.empty(num_heads, 2 * reach + 3, 2 * reach + 3, **to))
        nn.init.zeros_(self.position)

    def reset_parameters(self) -> None:
        """Draw new weights; no offset is preferred."""
        for layer in (self.query, self.key, self.value, self.proj):
            layer.reset_parameters()
        nn.init.zeros_(self.position)

    def position_scores(self, height: int, width: int) -> Tensor:
        """Return the bias (heads, H W, (H + 2 r) (W + 2 r)) of every pair of a token and what it may look at."""

        def offsets(size: int) -> Tensor:
            place = torch.arange(size + 2 * self.reach, device=self.position.device)
            step = place - self.reach - place[:size, None]
            return step.clamp(-self.reach - 1, self.reach + 1) + self.reach + 1

        rows, columns = offsets(height), offsets(width)
        scores = self.position[:, rows[:, None, :, None], columns[None, :, None, :]]
        return scores.flatten(3).flatten(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Let the tokens of `x` attend to each other and to the margin."""
        height, width = x.shape[1:3]
        wide = F.pad(x, (0, 0, *(self.reach,) * 4)).flatten(1, 2)

        def split(tokens: Tensor) -> Tensor:
            return tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        y = F.scaled_dot_product_attention(
            split(self.query(x.flatten(1, 2))),
            split(self.key(wide)),
            split(self.value(wide)),
            attn_mask=self.position_scores(height, width),
        )
        return self.proj(y.transpose(1, 2).flatten(2)).unflatten(1, (height, width))


CASES = (
    Case(
        PatchAttention,
        {"in_features": 6, "out_features": 4, "num_heads": 3, "head_dim": 5, "key_dim": 2},
        inputs=((2, 3, 5, 6),),
        output=(2, 3, 5, 4),
        vary=(0, 1, 2),
        minimal=(1, 1, 1, 6),
        channels_last=False,
        raises=(Raises(ValueError, "reach must not be negative: got -1", {"reach": -1}),),
    ),
)
