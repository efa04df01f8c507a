"""Focal sparse convolution: the active set grows where a predictor finds it worth while, and nowhere else.

Paper: Chen et al., Focal Sparse Convolutional Networks for 3D Object Detection, https://arxiv.org/abs/2204.12463.
Norm and activation, which there belong to the layer, are left to the network: `y.replace(act(norm(y.features)))`.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.cases import Case, Raises
from omniconv.layers.conv.sparse import (
    SubmanifoldConv1d,
    SubmanifoldConv2d,
    SubmanifoldConv3d,
    active_sites,
)
from omniconv.ops.sparse_conv.maps import taps, unique_sites
from omniconv.ops.sparse_conv.tensor import SparseTensor

__all__ = ["FocalConv1d", "FocalConv2d", "FocalConv3d"]

X = TypeVar("X", SparseTensor, Tensor)
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class FocalConv3d(nn.Module):
    r"""Sparse convolution with learned dilation of `Focals Conv <https://arxiv.org/abs/2204.12463>`_.

    .. math:: I^p = \sigma\Big(\sum_u V_u x_{p+u}\Big), \qquad
              F = \{p \in A : I^p_0 > \tau\}, \qquad
              A' = A \cup \{p + u : p \in F,\ I^p_u \ge \tau\}

    .. math:: y_q = \sum_{u:\ q + u \in A} W_u\, a_{q+u}\, x_{q+u}, \qquad q \in A'

    Each foreground site p of F votes for itself with 1 and for the neighbours p + u with their importance; where a
    foreground site gets votes, a is their mean, which leads gradients to the predictor V, elsewhere a = 1. With
    importance 1 everywhere this is the regular sparse convolution, with 0 the submanifold one.

    To supervise the predictor, ask for its logits, and pass them on: `logits = layer.importance(x)`,
    `y = layer(x, logits)`; the centre's, column K // 2, should say whether a site lies inside an object. To fuse
    image features (Focals Conv-F), ask with `x.replace(x.features + sampled)`.

    Args:
        in_channels, out_channels: channels of input and output.
        kernel_size: taps, odd, one number or one for every axis; K in all.
        threshold: :math:`\tau`.
        bias: add a number to every output channel.
        device, dtype: of the parameters.

    Shapes:
        - input: a `SparseTensor` with features :math:`(P, C)`, or a dense :math:`(N, C, D, H, W)`
        - logits: the same with K channels
        - output: the same with C' channels, sparse ones at the sites A'

    Raises:
        ValueError: if `kernel_size` is even or `threshold` lies outside [0, 1].
    """

    conv_class: type[SubmanifoldConv2d] = SubmanifoldConv3d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = 3,
        *,
        threshold: float = 0.5,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must lie in [0, 1]: got {threshold}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.threshold = threshold
        self.conv = self.conv_class(in_channels, out_channels, kernel_size, bias=bias, **factory)
        count = torch.Size(self.conv.kernel_size).numel()
        self.predictor = self.conv_class(in_channels, count, kernel_size, bias=False, **factory)

    def reset_parameters(self) -> None:
        """Draw new weights."""
        self.conv.reset_parameters()
        self.predictor.reset_parameters()

    def extra_repr(self) -> str:
        """Show the threshold."""
        return f"threshold={self.threshold}"

    def importance(self, x: X) -> X:
        """Return the logits of how important the neighbours of every active site are, in the order of the taps."""
        return self.predictor(x)

    def forward(self, x: X, logits: X | None = None) -> X:
        """Convolve `x` after growing its active set by the importance that `logits`, or the predictor, gives."""
        found = self.importance(x) if logits is None else logits
        if isinstance(x, Tensor):
            assert isinstance(found, Tensor)
            return self._forward_dense(x, found)
        assert isinstance(found, SparseTensor)
        return self.conv(self.grow(x, found.features))

    def _votes(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the votes, the centre's 1, and which of them count, from logits with the taps on axis 1."""
        importance = logits.sigmoid()
        centre = importance.shape[1] // 2
        own = torch.arange(importance.shape[1], device=logits.device) == centre
        own = own.reshape(-1, *(1,) * (logits.ndim - 2))
        foreground = importance[:, centre : centre + 1] > self.threshold
        counts = foreground & ((importance >= self.threshold) | own)
        return torch.where(own, 1, importance), counts

    def grow(self, x: SparseTensor, logits: Tensor) -> SparseTensor:
        """Return `x` with its new sites, whose features are zero, and its foreground weighted by the votes.

        Args:
            x: P active sites.
            logits: (P, K), of the importance.
        """
        votes, counts = self._votes(logits)
        half = torch.tensor([k // 2 for k in self.conv.kernel_size], device=logits.device)
        offsets = F.pad(taps(self.conv.kernel_size, self.conv.dilation, logits) - half, (1, 0))
        places = x.coordinates[:, None] + offsets
        sizes = torch.tensor(x.shape, device=logits.device)
        counts = counts & ((places[..., 1:] >= 0) & (places[..., 1:] < sizes)).all(-1)
        sites, which = unique_sites(torch.cat([x.coordinates, places[counts]]), x.shape)
        old, voted = which[: len(x.coordinates)], which[len(x.coordinates) :]
        total = votes.new_zeros(len(sites)).index_add(0, voted, votes[counts])
        number = votes.new_zeros(len(sites)).index_add(0, voted, torch.ones_like(votes[counts]))
        foreground = counts[:, counts.shape[1] // 2]
        scale = torch.where(foreground, total[old] / number[old].clamp(min=1), 1)
        features = x.features.new_zeros(len(sites), x.features.shape[1])
        features = features.index_copy(0, old, x.features * scale[:, None].to(x.features.dtype))
        return SparseTensor(features, sites, x.shape, x.batch_size)

    def _forward_dense(self, x: Tensor, logits: Tensor) -> Tensor:
        active, (votes, counts) = active_sites(x), self._votes(logits)
        counts = (counts & active).to(x.dtype)
        # What site p says of p + u arrives there through a transposed convolution with one tap for every u.
        arrive = torch.eye(counts.shape[1], dtype=x.dtype, device=x.device)
        arrive = arrive.reshape(-1, 1, *self.conv.kernel_size)
        transposed = _TRANSPOSED[self.conv.axes]
        number = transposed(counts, arrive, padding=self.conv.padding)
        total = transposed(counts * votes.to(x.dtype), arrive, padding=self.conv.padding)
        centre = counts.shape[1] // 2
        scale = torch.where(counts[:, centre : centre + 1] > 0.5, total / number.clamp(min=1), 1)
        return self.conv.convolve_dense(x * scale.to(x.dtype), active | (number > 0.5))


class FocalConv1d(FocalConv3d):
    """`FocalConv3d` for maps with one axis, dense ones of :math:`(N, C, L)`."""

    conv_class = SubmanifoldConv1d


class FocalConv2d(FocalConv3d):
    """`FocalConv3d` for maps with two axes, dense ones of :math:`(N, C, H, W)`."""

    conv_class = SubmanifoldConv2d


CASES = (
    Case(FocalConv1d, {"in_channels": 3, "out_channels": 4}, ((2, 3, 11),), (2, 4, 11), vary=(0, 2)),
    Case(
        FocalConv2d, {"in_channels": 3, "out_channels": 4, "kernel_size": (3, 5)}, ((2, 3, 9, 7),), (2, 4, 9, 7),
        minimal=(1, 3, 1, 1),
        raises=(Raises(ValueError, "threshold must lie in [0, 1]: got 2", {"threshold": 2}),),
    ),
    Case(
        FocalConv3d, {"in_channels": 3, "out_channels": 2, "bias": False}, ((2, 3, 7, 5, 4),), (2, 2, 7, 5, 4),
        vary=(0, 2, 3, 4),
    ),
)  # fmt: skip
