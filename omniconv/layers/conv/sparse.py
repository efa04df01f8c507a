"""Convolutions of maps of which few sites are active: work is done where there is something.

Papers: Graham et al., 3D Semantic Segmentation with Submanifold Sparse Convolutional Networks,
https://arxiv.org/abs/1711.10275. Both layers also take a dense map, which counts as the sparse one whose active
sites are its pixels with a channel that is not zero, and then give the same numbers as a dense map.
"""

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.cases import Case, Raises
from omniconv.ops.sparse_conv.api import sparse_conv
from omniconv.ops.sparse_conv.maps import kernel_map, output_shape, output_sites
from omniconv.ops.sparse_conv.tensor import SparseTensor

__all__ = [
    "SparseConv1d", "SparseConv2d", "SparseConv3d", "SubmanifoldConv1d", "SubmanifoldConv2d", "SubmanifoldConv3d",
    "active_sites",
]  # fmt: skip

Sizes = int | Sequence[int]
X = TypeVar("X", SparseTensor, Tensor)
_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def active_sites(x: Tensor) -> Tensor:
    """Return `(N, 1, *S)`, whether any channel of a dense map `(N, C, *S)` is not zero."""
    return (x != 0).any(1, keepdim=True)


class _Conv(nn.Module):
    """What the layers share: the kernel and its sizes."""

    axes: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes,
        padding: Sizes,
        dilation: Sizes,
        bias: bool,
        device,
        dtype,
    ) -> None:
        super().__init__()
        self.kernel_size, self.stride = self._sizes("kernel_size", kernel_size), self._sizes("stride", stride)
        self.padding = self._sizes("padding", padding, 0)
        self.dilation = self._sizes("dilation", dilation)
        shape = (out_channels, in_channels, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def _sizes(self, name: str, value: Sizes, least: int = 1) -> tuple[int, ...]:
        sizes = (value,) * self.axes if isinstance(value, int) else tuple(value)
        if len(sizes) != self.axes or min(sizes) < least:
            raise ValueError(f"{name} must be one or {self.axes} integers of at least {least}: got {value}")
        return sizes

    def reset_parameters(self) -> None:
        """Draw new weights, as torch's dense convolutions do."""
        bound = 1 / math.sqrt(self.weight[0].numel())
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def extra_repr(self) -> str:
        """Show the sizes."""
        out, channels = self.weight.shape[:2]
        return (
            f"{channels}, {out}, kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"dilation={self.dilation}, bias={self.bias is not None}"
        )

    def convolve_dense(self, x: Tensor, active: Tensor) -> Tensor:
        """Return the dense convolution of `x`, zero outside the output sites `active`, `(N, 1, *S)`."""
        y = _CONV[self.axes](x, self.weight, self.bias, self.stride, self.padding, self.dilation)
        return torch.where(active, y, 0)

    def _convolve(self, x: SparseTensor, neighbours: Tensor) -> Tensor:
        y = sparse_conv(x.features, self.weight, neighbours)
        return y if self.bias is None else y + self.bias


class SubmanifoldConv2d(_Conv):
    r"""Convolution of `submanifold sparse networks <https://arxiv.org/abs/1711.10275>`_: active sites stay the same.

    .. math:: y_p = b + \sum_{u:\ p + u \in A} W_u\, x_{p + u}, \qquad p \in A

    Layers at the same sites share one kernel map.

    Args:
        in_channels, out_channels: channels of input and output.
        kernel_size: taps, odd, one number or one for every axis.
        dilation: steps between taps.
        bias: add a number to every output channel.
        device, dtype: of the parameters.

    Shapes:
        - input: a `SparseTensor` with features :math:`(P, C)`, or a dense :math:`(N, C, H, W)`
        - output: the same with C' channels

    Raises:
        ValueError: if `kernel_size` is even.
    """

    axes = 2

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes = 3,
        *,
        dilation: Sizes = 1,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        sizes = self._sizes("kernel_size", kernel_size)
        if any(k % 2 == 0 for k in sizes):
            raise ValueError(f"kernel_size must be odd: got {kernel_size}")
        steps = self._sizes("dilation", dilation)
        padding = [d * (k // 2) for k, d in zip(sizes, steps, strict=True)]
        super().__init__(in_channels, out_channels, sizes, 1, padding, steps, bias, device, dtype)

    def forward(self, x: X) -> X:
        """Convolve `x` at its active sites."""
        if isinstance(x, Tensor):
            return self.convolve_dense(x, active_sites(x))
        key = (self.kernel_size, self.dilation)
        if key not in x.maps:
            sites, sizes = x.coordinates, (self.kernel_size, self.stride, self.padding, self.dilation)
            x.maps[key] = kernel_map(sites, sites, x.shape, *sizes)
        return x.replace(self._convolve(x, x.maps[key]))


class SubmanifoldConv1d(SubmanifoldConv2d):
    """`SubmanifoldConv2d` for maps with one axis, dense ones of :math:`(N, C, L)`."""

    axes = 1


class SubmanifoldConv3d(SubmanifoldConv2d):
    """`SubmanifoldConv2d` for maps with three axes, dense ones of :math:`(N, C, D, H, W)`."""

    axes = 3


class SparseConv2d(_Conv):
    r"""Regular `sparse convolution <https://arxiv.org/abs/1711.10275>`_: every site is active that sees an active one.

    .. math:: y_o = b + \sum_{u:\ s o + d u - p \in A} W_u\, x_{s o + d u - p}, \qquad
              A' = \{ o : s o + d u - p \in A \text{ for some } u \}

    Args:
        in_channels, out_channels: channels of input and output.
        kernel_size: taps, one number or one for every axis.
        stride: s.
        padding: p, sites on both sides of every axis.
        dilation: d.
        bias: add a number to every output channel.
        device, dtype: of the parameters.

    Shapes:
        - input: a `SparseTensor` with features :math:`(P, C)`, or a dense :math:`(N, C, H, W)`
        - output: the same with C' channels, other sites, and the sizes of torch's dense convolution

    Raises:
        ValueError: if a size is not positive, or the kernel does not fit into the map.
    """

    axes = 2

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes = 3,
        *,
        stride: Sizes = 1,
        padding: Sizes = 0,
        dilation: Sizes = 1,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, bias, device, dtype
        )

    def forward(self, x: X) -> X:
        """Convolve `x` wherever a tap meets an active site."""
        sizes = (self.kernel_size, self.stride, self.padding, self.dilation)
        if isinstance(x, Tensor):
            ones = x.new_ones(1, 1, *self.kernel_size)
            seen = _CONV[self.axes](active_sites(x).to(x.dtype), ones, None, *sizes[1:])
            return self.convolve_dense(x, seen > 0.5)
        sites = output_sites(x.coordinates, x.shape, *sizes)
        features = self._convolve(x, kernel_map(x.coordinates, sites, x.shape, *sizes))
        return SparseTensor(features, sites, output_shape(x.shape, *sizes), x.batch_size)


class SparseConv1d(SparseConv2d):
    """`SparseConv2d` for maps with one axis, dense ones of :math:`(N, C, L)`."""

    axes = 1


class SparseConv3d(SparseConv2d):
    """`SparseConv2d` for maps with three axes, dense ones of :math:`(N, C, D, H, W)`."""

    axes = 3


CASES = (
    Case(
        SubmanifoldConv1d, {"in_channels": 3, "out_channels": 4, "kernel_size": 5}, ((2, 3, 11),), (2, 4, 11),
        vary=(0, 2),
    ),
    Case(
        SubmanifoldConv2d, {"in_channels": 3, "out_channels": 4, "kernel_size": (3, 5), "dilation": (2, 1)},
        ((2, 3, 9, 7),), (2, 4, 9, 7), minimal=(1, 3, 1, 1),
        raises=(
            Raises(ValueError, "kernel_size must be odd: got 2", {"kernel_size": 2}),
            Raises(ValueError, "dilation must be one or 2 integers of at least 1: got 0", {"dilation": 0}),
        ),
    ),
    Case(
        SubmanifoldConv3d, {"in_channels": 3, "out_channels": 2, "bias": False}, ((2, 3, 7, 5, 4),), (2, 2, 7, 5, 4),
        vary=(0, 2, 3, 4),
    ),
    Case(
        SparseConv1d, {"in_channels": 3, "out_channels": 2, "kernel_size": 4, "stride": 3, "padding": 1},
        ((2, 3, 11),), (2, 2, 4), vary=(0, 2),
    ),
    Case(
        SparseConv2d, {"in_channels": 3, "out_channels": 4, "stride": (2, 1), "padding": 1, "dilation": (1, 2)},
        ((2, 3, 9, 8),), (2, 4, 5, 6),
        raises=(Raises(ValueError, "padding must be one or 2 integers of at least 0: got -1", {"padding": -1}),),
    ),
    Case(
        SparseConv3d, {"in_channels": 3, "out_channels": 2, "padding": 1, "bias": False}, ((2, 3, 7, 5, 4),),
        (2, 2, 7, 5, 4), vary=(0, 2, 3, 4),
    ),
)  # fmt: skip
