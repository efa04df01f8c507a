"""Spatial-reduction attention: every pixel attends to the whole map, whose keys and values were made fewer.

Paper: Wang et al., Pyramid Vision Transformer, https://arxiv.org/abs/2102.12122. Parameter names are those of the
official weights. Maps of any size work: what the last patches lack is zeros.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.cases import Case, Raises

__all__ = ["SpatialReductionAttention"]


class SpatialReductionAttention(nn.Module):
    r"""Attention of the `Pyramid Vision Transformer <https://arxiv.org/abs/2102.12122>`_.

    .. math:: y = W_o\, \mathrm{softmax}\Big(\frac{(W_q x)(W_k s)^T}{\sqrt{d}}\Big) W_v s, \qquad
        s = \mathrm{LN}(w *_r x)

    where w is an r x r convolution of stride r, so that there are :math:`r^2` times fewer keys than pixels.

    Args:
        channels: C.
        num_heads: heads of d = C / num_heads channels.
        reduction: r; 1 for none.
        device, dtype: of the parameters.

    Shapes:
        - input and output: :math:`(N, C, H, W)`

    Raises:
        ValueError: if `num_heads` does not divide `channels`.
    """

    def __init__(
        self, channels: int, num_heads: int = 8, reduction: int = 1, *, device=None, dtype=None
    ) -> None:
        super().__init__()
        if channels % num_heads:
            raise ValueError(f"num_heads must divide channels: got {num_heads} and {channels}")
        self.num_heads, self.reduction = num_heads, reduction
        self.q = nn.Linear(channels, channels, bias=True, device=device, dtype=dtype)
        self.kv = nn.Linear(channels, 2 * channels, bias=True, device=device, dtype=dtype)
        self.proj = nn.Linear(channels, channels, device=device, dtype=dtype)
        if reduction > 1:
            self.sr = nn.Conv2d(channels, channels, reduction, reduction, device=device, dtype=dtype)
            self.norm = nn.LayerNorm(channels, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw new weights."""
        for layer in self.children():
            if isinstance(layer, nn.Linear | nn.Conv2d | nn.LayerNorm):
                layer.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Let every pixel attend to the reduced map."""
        height, width = x.shape[2:]
        reduced = x
        if self.reduction > 1:
            reduced = self.sr(F.pad(x, (0, -width % self.reduction, 0, -height % self.reduction)))
            reduced = self.norm(reduced.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        q = self.q(x.flatten(2).transpose(1, 2)).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        kv = self.kv(reduced.flatten(2).transpose(1, 2)).unflatten(2, (2, self.num_heads, -1))
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj(y).unflatten(1, (height, width)).permute(0, 3, 1, 2)


CASES = (
    Case(
        SpatialReductionAttention, {"channels": 6, "num_heads": 2, "reduction": 3},
        ((2, 6, 7, 5),), (2, 6, 7, 5), minimal=(1, 6, 1, 1),
        raises=(Raises(ValueError, "num_heads must divide channels: got 4 and 6", {"num_heads": 4}),),
    ),
    Case(
        SpatialReductionAttention, {"channels": 4, "num_heads": 1}, ((2, 4, 3, 5),), (2, 4, 3, 5), id="plain",
    ),
)  # fmt: skip
