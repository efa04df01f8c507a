"""Cheap convolution by three means: one kernel a channel, projection within a grid of channels, at fewer pixels.

Paper: Wang, Liu and Foroosh, Design of Efficient Convolutional Layers, https://arxiv.org/abs/1608.04337, an early
relative of depthwise separable convolution. A dense convolution of n channels costs k^2 n^2 multiply-adds a pixel, a
single intra-channel convolution k^2 n + n^2.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.cases import Case, Raises

__all__ = ["SICUnit", "SpatialBottleneck", "TopologicalProjection", "window_indices"]


def window_indices(grid: Sequence[int], window: Sequence[int]) -> Tensor:
    """Return which channels each channel of a grid sees, (window places, channels); edges wrap around.

    Args:
        grid: channels along each axis of the grid; the last axis runs fastest.
        window: odd numbers of neighbours along each axis, the channel itself among them.

    Raises:
        ValueError: if a window is even, or larger than its axis.
    """
    if len(grid) != len(window) or any(w % 2 == 0 or w > g for w, g in zip(window, grid, strict=False)):
        raise ValueError(
            f"window must be odd and not larger than the grid on every axis: got {tuple(window)} in {tuple(grid)}"
        )
    channels = torch.arange(math.prod(grid), device="cpu").view(*grid)
    reach = [range(w // 2, -(w // 2) - 1, -1) for w in window]
    axes = tuple(range(len(grid)))
    return torch.stack([channels.roll(shift, axes).flatten() for shift in itertools.product(*reach)])


class TopologicalProjection(nn.Module):
    r"""1x1 convolution in which a channel sees its neighbours on a grid of channels alone (topological subdivisioning).

    .. math:: y_c = \sum_{j \in \mathcal N(c)} w_{c,j}\, x_j

    Args:
        grid: channels along each axis of the grid, such as (8, 8) for 64.
        window: odd numbers of neighbours along each axis; edges wrap around, so all channels see equally many.
        device, dtype: of the parameters.

    Shapes:
        - input and output: :math:`(N, C, H, W)`

    Raises:
        ValueError: if a window is even, or larger than its axis.
    """

    indices: Tensor

    def __init__(self, grid: Sequence[int], window: Sequence[int], *, device=None, dtype=None) -> None:
        super().__init__()
        indices = window_indices(grid, window)
        self.register_buffer("indices", indices.to(device or torch.get_default_device()), persistent=False)
        self.weight = nn.Parameter(torch.empty(*indices.shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights, as torch draws a convolution with as many inputs."""
        bound = len(self.weight) ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Project `x`."""
        weight = self.weight[:, :, None, None]
        y = weight[0] * x[:, self.indices[0]]
        for place in range(1, len(weight)):
            y = torch.addcmul(y, weight[place], x[:, self.indices[place]])
        return y


def _projection(
    in_channels: int, out_channels: int, grid: Sequence[int], window: Sequence[int], **factory: Any
) -> nn.Module:
    if not grid:
        return nn.Conv2d(in_channels, out_channels, 1, bias=False, **factory)
    if not in_channels == out_channels == math.prod(grid):
        raise ValueError(
            f"a grid needs as many channels in and out as it has places: got {in_channels}, {out_channels} "
            f"and {tuple(grid)}"
        )
    return TopologicalProjection(grid, window, **factory)


class SICUnit(nn.Module):
    r"""Single intra-channel convolution of `Wang et al. <https://arxiv.org/abs/1608.04337>`_ with its projection.

    .. math:: y = x + P\, (D * x)

    with one k x k kernel a channel in D and a linear projection P across channels. The shortcut is there when stride
    is 1 and the channels agree. Norms and activations stand between units.

    Args:
        in_channels, out_channels: of input and output.
        kernel_size: k, odd.
        stride: of D.
        grid, window: of the projection, as in `TopologicalProjection`; a full 1x1 convolution if empty.
        device, dtype: of the parameters.

    Shapes:
        - input: :math:`(N, C_\mathrm{in}, H, W)`
        - output: :math:`(N, C_\mathrm{out}, \lceil H / s \rceil, \lceil W / s \rceil)`

    Raises:
        ValueError: if `kernel_size` is even, or grid, window and channels do not fit together.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        grid: Sequence[int] = (),
        window: Sequence[int] = (),
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive: got {kernel_size}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.has_skip = stride == 1 and in_channels == out_channels
        self.spatial = nn.Conv2d(
            in_channels,
            in_channels,
            kernel_size,
            stride,
            kernel_size // 2,
            groups=in_channels,
            bias=False,
            **factory,
        )
        self.project = _projection(in_channels, out_channels, grid, window, **factory)

    def reset_parameters(self) -> None:
        """Draw new weights."""
        for module in self.children():
            module.reset_parameters()  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        """Return the unit's output."""
        y = self.project(self.spatial(x))
        return x + y if self.has_skip else y


class SpatialBottleneck(nn.Module):
    r"""Projection at fewer pixels of `Wang et al. <https://arxiv.org/abs/1608.04337>`_, between two depthwise layers.

    .. math:: y = x + D^\mathsf{T}_s * P\, (D_s * x)

    with a depthwise convolution of stride s and kernel s x s, a linear projection P, and a depthwise transposed
    convolution back; P costs :math:`n^2 / s^2` multiply-adds a pixel. Sizes that s does not divide get zeros.

    Args:
        channels: n, of input and output.
        stride: s.
        grid, window: of the projection, as in `TopologicalProjection`; a full 1x1 convolution if empty.
        device, dtype: of the parameters.

    Shapes:
        - input and output: :math:`(N, C, H, W)`

    Raises:
        ValueError: if grid, window and channels do not fit together.
    """

    def __init__(
        self,
        channels: int,
        stride: int = 2,
        *,
        grid: Sequence[int] = (),
        window: Sequence[int] = (),
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        depthwise: dict[str, Any] = {"groups": channels, "bias": False, **factory}
        self.stride = stride
        self.reduce = nn.Conv2d(channels, channels, stride, stride, **depthwise)
        self.project = _projection(channels, channels, grid, window, **factory)
        self.restore = nn.ConvTranspose2d(channels, channels, stride, stride, **depthwise)

    def reset_parameters(self) -> None:
        """Draw new weights."""
        for module in self.children():
            module.reset_parameters()  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output."""
        below, right = (-size % self.stride for size in x.shape[2:])
        y = self.restore(self.project(self.reduce(F.pad(x, (0, right, 0, below)))))
        return x + F.pad(y, (0, -right, 0, -below))


CASES = (
    Case(
        TopologicalProjection,
        {"grid": (3, 4), "window": (3, 1)},
        inputs=((2, 12, 7, 5),),
        output=(2, 12, 7, 5),
        channels_last=False,  # torch gathers channels into channels-first
        minimal=(1, 12, 1, 1),
        raises=(
            Raises(
                ValueError,
                "window must be odd and not larger than the grid on every axis: got (2, 1) in (3, 4)",
                {"window": (2, 1)},
            ),
        ),
    ),
    Case(
        SICUnit,
        {"in_channels": 12, "out_channels": 12, "grid": (2, 2, 3), "window": (1, 1, 3)},
        inputs=((2, 12, 7, 5),),
        output=(2, 12, 7, 5),
        id="grid",
        minimal=(1, 12, 1, 1),
        raises=(
            Raises(
                ValueError,
                "kernel_size must be odd and positive: got 2",
                {"kernel_size": 2},
            ),
            Raises(
                ValueError,
                "a grid needs as many channels in and out as it has places: got 12, 10 and (2, 2, 3)",
                {"out_channels": 10},
            ),
        ),
    ),
    Case(
        SICUnit,
        {"in_channels": 4, "out_channels": 6, "kernel_size": 5, "stride": 2},
        inputs=((2, 4, 7, 10),),
        output=(2, 6, 4, 5),
        id="stride",
        minimal=(1, 4, 1, 1),
    ),
    Case(
        SpatialBottleneck,
        {"channels": 6, "stride": 3},
        inputs=((2, 6, 7, 8),),
        output=(2, 6, 7, 8),
        minimal=(1, 6, 1, 1),
    ),
)
