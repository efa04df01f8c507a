"""Streams: layers and networks that take a clip frame by frame and compute nothing twice.

Paper: Hedegaard, Efficient Online Processing with Deep Neural Networks, https://arxiv.org/abs/2306.13474.

A frame is what a clip network would hold for a clip of one frame. A stream begins with the zeros that the clip
network pads in front; `forward_steps(..., end=True)` feeds those behind. So the outputs of a whole stream are those
of one long clip, in order and none missing, and a network without padding over time gives for every frame what the
clip network gives for the window that ends there. Branches of different delay need no counting: whoever joins them
keeps the outputs of the earlier one until the later one has caught up.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["Span", "Stream", "Window", "count_step_macs"]


@dataclass(frozen=True)
class Span:
    """Which frames an output depends on: output n on those from n * stride - before, `length` of them.

    Attributes:
        length: receptive field, in frames.
        stride: input frames per output.
        before: frames of zeros in front of the first.
    """

    length: int = 1
    stride: int = 1
    before: int = 0

    @property
    def delay(self) -> int:
        """Frames that come after frame n * stride until output n is there."""
        return self.length - 1 - self.before

    def then(self, after: "Span") -> "Span":
        """Return the span of a layer of span `after` behind one of this span."""
        length = self.length + (after.length - 1) * self.stride
        return Span(length, self.stride * after.stride, self.before + after.before * self.stride)

    def join(self, other: "Span") -> "Span":
        """Return the span of a sum of two streams of one stride."""
        before = max(self.before, other.before)
        return Span(max(self.delay, other.delay) + before + 1, self.stride, before)


class Stream(nn.Module):
    """Base of what runs on clips (`forward`) and, in eval mode and without gradients, on frames.

    A subclass says what `span` it has and how `steps` turns new frames into the outputs that they complete. What it
    remembers is `_stream`, plain values and tensors, None before the first frame.
    """

    axis: int = 2
    whole: bool = False
    """Whether every output is one of the clip network for a whole window, rather than a frame."""
    _stream: Any = None

    @property
    def span(self) -> Span:
        """Which frames an output depends on."""
        return Span()

    @property
    def receptive_field(self) -> int:
        """Frames on which an output depends."""
        return self.span.length

    @property
    def delay(self) -> int:
        """Frames that come after a frame until the output that belongs to it is there."""
        return self.span.delay

    @property
    def time_stride(self) -> int:
        """Frames per output."""
        return self.span.stride

    def steps(self, frames: list[Tensor]) -> list[Tensor]:
        """Take new frames, each a clip of length one, and return the outputs that they complete."""
        raise NotImplementedError

    def flush(self) -> list[Tensor]:
        """Return the outputs that need zeros behind the last frame; the stream is over then."""
        return []

    def forward_step(self, frame: Tensor) -> Tensor | None:
        """Take one frame, a clip without its time axis, and return the output that it completes, if any.

        Padding in front may complete several with the first frame; `forward_steps` returns all of them.
        """
        outputs = self._outputs([frame.unsqueeze(self.axis)], end=False)
        return None if not outputs else outputs[-1] if self.whole else outputs[-1].squeeze(self._out_axis)

    def forward_steps(self, clip: Tensor, *, end: bool = False) -> Tensor | None:
        """Take the frames of a clip in turn and return the outputs that they complete, if any.

        Args:
            clip: with the time axis.
            end: whether the stream ends with them; outputs over the zeros behind come too, and the next frame
                begins a new stream.

        Returns:
            Outputs along the time axis, or, where each belongs to a whole window, along a new axis 1.
        """
        outputs = self._outputs(list(clip.split(1, self.axis)), end)
        if not outputs:
            return None
        return torch.stack(outputs, 1) if self.whole else torch.cat(outputs, self._out_axis)

    @property
    def _out_axis(self) -> int:
        return self.axis

    @torch.no_grad()
    def _outputs(self, frames: list[Tensor], end: bool) -> list[Tensor]:
        if self.training:
            raise ValueError(f"{type(self).__name__} streams in eval mode only; call eval() first")
        outputs = self.steps(frames)
        if end:
            outputs = outputs + self.flush()
            self.reset_stream()
        return outputs

    def reset_stream(self) -> None:
        """Forget all frames; the next one begins a new stream."""
        for stream in self._streams().values():
            stream._stream = None

    def stream_state(self) -> dict[str, Any]:
        """Return what the stream remembers, as plain values and tensors of its own, to be saved or restored."""
        return {name: copy.deepcopy(stream._stream) for name, stream in self._streams().items()}

    def load_stream_state(self, state: dict[str, Any]) -> None:
        """Go on from a `stream_state`, of this network or of one built alike."""
        streams = self._streams()
        if state.keys() != streams.keys():
            raise ValueError(
                f"the state is of another network: {sorted(state.keys() ^ streams.keys())} differ"
            )
        for name, stream in streams.items():
            stream._stream = copy.deepcopy(state[name])

    def _streams(self) -> "dict[str, Stream]":
        return {name: module for name, module in self.named_modules() if isinstance(module, Stream)}


class Window(Stream):
    """A stream whose outputs are computed from windows of frames.

    Frames wait, as `prepare` made them, until the last window that holds them is complete.
    """

    def window(self) -> tuple[int, int, int, int]:
        """Return the length and stride of windows, and how many blank frames are padded before and behind."""
        raise NotImplementedError

    def prepare(self, frame: Tensor) -> Tensor:
        """Do what each frame needs once."""
        return frame

    def compute(self, clip: Tensor) -> Tensor:
        """Return the outputs of a clip of prepared frames, without padding over time."""
        raise NotImplementedError

    def blank(self, frame: Tensor) -> Tensor:
        """Return the prepared frame that padding stands for."""
        return torch.zeros_like(frame)

    @property
    def span(self) -> Span:
        """Which frames an output depends on."""
        length, stride, before, _ = self.window()
        return Span(length, stride, before)

    def steps(self, frames: list[Tensor]) -> list[Tensor]:
        """Take new frames and return the outputs that they complete."""
        return self._slide([self.prepare(frame) for frame in frames])

    def flush(self) -> list[Tensor]:
        """Return the outputs that need padding behind the last frame."""
        waiting = self._stream["frames"] if self._stream else []
        return self._slide([self.blank(waiting[-1])] * self.window()[3]) if waiting else []

    def _slide(self, frames: list[Tensor]) -> list[Tensor]:
        if not frames:
            return []
        length, stride, before, _ = self.window()
        state = self._stream or {"frames": [self.blank(frames[0])] * before, "skip": 0}
        waiting, skip = state["frames"] + frames, state["skip"]
        # A stride longer than the window leaves out frames that have not come yet.
        waiting, skip = waiting[skip:], max(0, skip - len(waiting))
        count = max(0, (len(waiting) - length) // stride + 1)
        outputs: list[Tensor] = []
        if count:
            clip = torch.cat(waiting[: (count - 1) * stride + length], self.axis)
            outputs = list(self.compute(clip).split(1, self.axis))
            waiting, skip = waiting[count * stride :], max(0, count * stride - len(waiting))
        self._stream = {"frames": waiting, "skip": skip}
        return outputs


def count_step_macs(stream: Stream, input_shape: tuple[int, ...], *, frames: int = 4) -> float:
    """Return the multiply-adds that one new frame costs a running stream of one sample, on average.

    Args:
        stream: left as it is.
        input_shape: of a clip of one sample, for example (3, 16, 112, 112); its length does not matter.
        frames: how many outputs to count over.
    """
    twin = copy.deepcopy(stream).eval()
    twin.reset_stream()
    like = next(twin.parameters(), torch.empty(0))
    clip = torch.randn(1, *input_shape, device=like.device, dtype=like.dtype)
    frame = clip.select(twin.axis, 0)
    for _ in range(max(twin.receptive_field, twin.delay + 1) + twin.time_stride):
        twin.forward_step(frame)
    counted = frames * twin.time_stride
    counter = FlopCounterMode(display=False)
    with counter:
        for _ in range(counted):
            twin.forward_step(frame)
    return counter.get_total_flops() / 2 / counted
