"""Continual pooling and padding: each frame is pooled over space once, and windows of pooled frames over time.

Paper: Hedegaard, Efficient Online Processing with Deep Neural Networks, https://arxiv.org/abs/2306.13474. The mean of
a window is summed anew for every output, from frames that are pooled already, so that rounding errors of a running
sum cannot pile up.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.deploy.continual.stream import Span, Stream, Window

__all__ = [
    "ClipMean", "ContinualAdaptiveAvgPool1d", "ContinualAdaptiveAvgPool2d", "ContinualAdaptiveAvgPool3d",
    "ContinualAdaptiveMaxPool1d", "ContinualAdaptiveMaxPool2d", "ContinualAdaptiveMaxPool3d", "ContinualAvgPool1d",
    "ContinualAvgPool2d", "ContinualAvgPool3d", "ContinualConstantPad1d", "ContinualConstantPad2d",
    "ContinualConstantPad3d", "ContinualMaxPool1d", "ContinualMaxPool2d", "ContinualMaxPool3d", "Crop", "Latest",
]  # fmt: skip

_AVERAGE = {2: F.avg_pool2d, 3: F.avg_pool3d}
_MAXIMUM = {2: F.max_pool2d, 3: F.max_pool3d}


class _Pool(Window):
    """Pooling whose first axis behind the channels is time."""

    axes: int
    ceil_mode: bool
    count_include_pad: bool

    def _sizes(self, name: str) -> tuple[int, ...]:
        value = getattr(self, name, 1)
        return (value,) * self.axes if isinstance(value, int) else tuple(value)

    def window(self) -> tuple[int, int, int, int]:
        """Return length, stride and padding over time."""
        (kernel, *_), (stride, *_), (pad, *_) = map(self._sizes, ("kernel_size", "stride", "padding"))
        (dilation, *_) = self._sizes("dilation")
        if getattr(self, "ceil_mode", False) and stride > 1:
            raise ValueError("ceil_mode depends on the length of the clip; set it to False to stream")
        if pad and not getattr(self, "count_include_pad", True):
            raise ValueError(
                "count_include_pad=False with padding over time depends on where the clip begins"
            )
        if getattr(self, "divisor_override", None):
            raise ValueError("divisor_override must be None to stream")
        if getattr(self, "return_indices", False):
            raise ValueError("return_indices must be False to stream")
        return dilation * (kernel - 1) + 1, stride, pad, pad

    def _windows(self, clip: Tensor) -> Tensor:
        length, stride, _, _ = self.window()
        return clip.unfold(self.axis, length, stride)[..., :: self._sizes("dilation")[0]]


class _AvgPool(_Pool):
    def prepare(self, frame: Tensor) -> Tensor:
        """Average a frame over space."""
        if self.axes == 1:
            return frame
        kernel, stride, pad = map(self._sizes, ("kernel_size", "stride", "padding"))
        space = ((1, *kernel[1:]), (1, *stride[1:]), (0, *pad[1:]))
        return _AVERAGE[self.axes](frame, *space, self.ceil_mode, self.count_include_pad)

    def compute(self, clip: Tensor) -> Tensor:
        """Average windows over time."""
        return self._windows(clip).mean(-1)


class _MaxPool(_Pool):
    def prepare(self, frame: Tensor) -> Tensor:
        """Take maxima of a frame over space."""
        if self.axes == 1:
            return frame
        kernel, stride, pad, dilation = map(self._sizes, ("kernel_size", "stride", "padding", "dilation"))
        space = ((1, *kernel[1:]), (1, *stride[1:]), (0, *pad[1:]), (1, *dilation[1:]))
        return _MAXIMUM[self.axes](frame, *space, self.ceil_mode)

    def compute(self, clip: Tensor) -> Tensor:
        """Take maxima of windows over time."""
        return self._windows(clip).amax(-1)

    def blank(self, frame: Tensor) -> Tensor:
        """Return minus infinity, which is never the maximum."""
        return torch.full_like(frame, -torch.inf)


class ContinualAvgPool1d(_AvgPool, nn.AvgPool1d):
    """Streaming `torch.nn.AvgPool1d` over (N, C, T)."""

    axes = 1


class ContinualAvgPool2d(_AvgPool, nn.AvgPool2d):
    """Streaming `torch.nn.AvgPool2d` over (N, C, T, V)."""

    axes = 2


class ContinualAvgPool3d(_AvgPool, nn.AvgPool3d):
    """Streaming `torch.nn.AvgPool3d` over (N, C, T, H, W)."""

    axes = 3


class ContinualMaxPool1d(_MaxPool, nn.MaxPool1d):
    """Streaming `torch.nn.MaxPool1d` over (N, C, T)."""

    axes = 1


class ContinualMaxPool2d(_MaxPool, nn.MaxPool2d):
    """Streaming `torch.nn.MaxPool2d` over (N, C, T, V)."""

    axes = 2


class ContinualMaxPool3d(_MaxPool, nn.MaxPool3d):
    """Streaming `torch.nn.MaxPool3d` over (N, C, T, H, W)."""

    axes = 3


class _ClipPool(Window):
    """Pooling over all of time: over a window as long as the clips, for every frame."""

    whole = True
    frames: int

    def window(self) -> tuple[int, int, int, int]:
        """Return the length of a clip; it moves frame by frame."""
        return self.frames, 1, 0, 0

    def compute(self, clip: Tensor) -> Tensor:
        """Average windows as long as a clip."""
        return clip.unfold(self.axis, self.frames, 1).mean(-1)


class _AdaptivePool(_ClipPool):
    """Adaptive pooling to one frame.

    Args:
        output_size: as torch's layer takes it; 1 over time.
        frames: length of the window, that of the clips which reach this layer.
    """

    def __init__(self, output_size: int | tuple[int | None, ...], frames: int) -> None:
        super().__init__(output_size)
        self.frames = frames

    def prepare(self, frame: Tensor) -> Tensor:
        """Pool a frame over space."""
        return self(frame)


class _AdaptiveMaxPool(_AdaptivePool):
    def compute(self, clip: Tensor) -> Tensor:
        """Take maxima of windows as long as a clip."""
        return clip.unfold(self.axis, self.frames, 1).amax(-1)


class ContinualAdaptiveAvgPool1d(_AdaptivePool, nn.AdaptiveAvgPool1d):
    """Continual average pooling: `torch.nn.AdaptiveAvgPool1d(1)` over the last `frames` frames of (N, C, T)."""


class ContinualAdaptiveAvgPool2d(_AdaptivePool, nn.AdaptiveAvgPool2d):
    """Continual average pooling: `torch.nn.AdaptiveAvgPool2d` to one frame, over the last of (N, C, T, V)."""


class ContinualAdaptiveAvgPool3d(_AdaptivePool, nn.AdaptiveAvgPool3d):
    """Continual average pooling: `torch.nn.AdaptiveAvgPool3d` to one frame, over the last of (N, C, T, H, W)."""


class ContinualAdaptiveMaxPool1d(_AdaptiveMaxPool, nn.AdaptiveMaxPool1d):
    """`torch.nn.AdaptiveMaxPool1d(1)` over the last `frames` frames of (N, C, T)."""


class ContinualAdaptiveMaxPool2d(_AdaptiveMaxPool, nn.AdaptiveMaxPool2d):
    """`torch.nn.AdaptiveMaxPool2d` to one frame, over the last `frames` frames of (N, C, T, V)."""


class ContinualAdaptiveMaxPool3d(_AdaptiveMaxPool, nn.AdaptiveMaxPool3d):
    """`torch.nn.AdaptiveMaxPool3d` to one frame, over the last `frames` frames of (N, C, T, H, W)."""


class ClipMean(_ClipPool):
    """Mean over axes that include time, over the last `frames` frames.

    Args:
        dims: axes of the clip.
        frames: length of the window.
        keepdim: keep these axes, of length one.
        axis: that of time.
    """

    def __init__(self, dims: tuple[int, ...], frames: int, *, keepdim: bool = False, axis: int = 2) -> None:
        super().__init__()
        self.dims = dims
        self.frames = frames
        self.keepdim = keepdim
        self.axis = axis

    def forward(self, clip: Tensor) -> Tensor:
        """Average a clip."""
        return clip.mean(self.dims, self.keepdim)

    def prepare(self, frame: Tensor) -> Tensor:
        """Average a frame over the other axes."""
        return frame.mean(self.dims, keepdim=True)

    def steps(self, frames: list[Tensor]) -> list[Tensor]:
        """Take new frames and return the means of windows that they complete."""
        means = super().steps(frames)
        return means if self.keepdim else [mean.squeeze(self.dims) for mean in means]


class Crop(Stream):
    """Leaves out the first and last frames, as `clip[:, :, before:-after]` does.

    Args:
        before: frames left out at the beginning.
        after: frames left out at the end.
        axis: that of time.
    """

    def __init__(self, before: int, after: int = 0, *, axis: int = 2) -> None:
        super().__init__()
        self.before = before
        self.after = after
        self.axis = axis

    @property
    def span(self) -> Span:
        """Which frames an output depends on: itself, and that `after` more have come."""
        return Span(1 + self.after, 1, -self.before)

    def forward(self, clip: Tensor) -> Tensor:
        """Crop a clip."""
        return clip.narrow(self.axis, self.before, clip.shape[self.axis] - self.before - self.after)

    def steps(self, frames: list[Tensor]) -> list[Tensor]:
        """Take new frames and return those that are not among the last."""
        state = self._stream or {"skip": self.before, "frames": []}
        waiting = state["frames"] + frames[state["skip"] :]
        skip = max(0, state["skip"] - len(frames))
        ready = max(0, len(waiting) - self.after)
        self._stream = {"skip": skip, "frames": waiting[ready:]}
        return waiting[:ready]


class Latest(Crop):
    """The last frame of a clip without its time axis, `clip[:, :, -1]`: of a stream, the latest.

    Args:
        frames: length of the clips; nothing comes before there are as many.
        axis: that of time.
    """

    whole = True

    def __init__(self, frames: int, *, axis: int = 2) -> None:
        super().__init__(frames - 1, axis=axis)

    def forward(self, clip: Tensor) -> Tensor:
        """Return the last frame of a clip."""
        return clip.select(self.axis, -1)

    def steps(self, frames: list[Tensor]) -> list[Tensor]:
        """Take new frames and return them."""
        return [frame.squeeze(self.axis) for frame in super().steps(frames)]


class _Pad(Window):
    """Constant padding whose first axis behind the channels is time."""

    padding: Any
    value: float

    def window(self) -> tuple[int, int, int, int]:
        """Return single frames, and how many blank ones stand before and behind."""
        before, after = self.padding[-2:]
        return 1, 1, before, after

    def prepare(self, frame: Tensor) -> Tensor:
        """Pad a frame over space."""
        return F.pad(frame, (*self.padding[:-2], 0, 0), value=self.value)

    def compute(self, clip: Tensor) -> Tensor:
        """Pass frames on."""
        return clip

    def blank(self, frame: Tensor) -> Tensor:
        """Return a frame of the constant."""
        return torch.full_like(frame, self.value)

    def steps(self, frames: list[Tensor]) -> list[Tensor]:
        """Take new frames and return them, the blank ones before the first."""
        outputs = super().steps(frames)
        if outputs:
            self._stream["last"] = outputs[-1]
        return outputs

    def flush(self) -> list[Tensor]:
        """Return the blank frames behind the last."""
        return [self.blank(self._stream["last"])] * self.padding[-1] if self._stream else []


class ContinualConstantPad1d(_Pad, nn.ConstantPad1d):
    """Streaming `torch.nn.ConstantPad1d` (and `ZeroPad1d`) over (N, C, T), which makes convolutions causal."""


class ContinualConstantPad2d(_Pad, nn.ConstantPad2d):
    """Streaming `torch.nn.ConstantPad2d` (and `ZeroPad2d`) over (N, C, T, V)."""


class ContinualConstantPad3d(_Pad, nn.ConstantPad3d):
    """Streaming `torch.nn.ConstantPad3d` (and `ZeroPad3d`) over (N, C, T, H, W)."""


def pooling_twins() -> dict[type[nn.Module], type[Stream]]:
    """Return torch's layers and what streams them."""
    names = [name for name in __all__ if name.startswith("Continual")]
    twins = {getattr(nn, name.removeprefix("Continual")): globals()[name] for name in names}
    twins |= {getattr(nn, f"ZeroPad{n}d"): globals()[f"ContinualConstantPad{n}d"] for n in (1, 2, 3)}
    return twins
