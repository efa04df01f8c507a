"""How kernels on CPUs run over a call: its axes in order, cut into tiles, their registers, their threads."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

# Below this many multiplications a second thread costs more than it does.
_WORTH_A_THREAD = 100_000
# What a vector that the registers take up or give back costs, in multiplications, and what calling the loops does.
_HANDING, _CALLING = 2, 15


class Layout(ABC):
    """The three axes of a call in the order in which kernels run over them, and into how many tiles each is cut.

    `axes` holds what the kernels' table says of each: pixels, outputs and taps, then what the kernels want besides. The
    last axis has the longest kernel, then the most outputs; those that a call lacks come first.
    """

    def __init__(self, values: Sequence[Sequence[int]], missing: Sequence[int]) -> None:
        _, out, kernel, *_ = values
        order = sorted(range(len(kernel)), key=lambda axis: (kernel[axis], out[axis], axis))
        self.order = [None] * (3 - len(kernel)) + order
        self.axes: list[list[int]] = [
            list(missing) if axis is None else [int(value[axis]) for value in values] for axis in self.order
        ]
        self.tiles = [1, 1, 1]

    @abstractmethod
    def tile_bytes(self) -> int:
        """Return what the buffers for a tile take."""

    def reach(self, axis: int) -> float:
        """Return by how many outputs a kernel reaches along an axis."""
        return self.axes[axis][2]

    def cut(self, most: int) -> None:
        """Cut into tiles until the buffers for one take at most so many bytes, if that is worth it."""
        while self.tile_bytes() > most:
            # Tiles overlap by the reach of the kernel, so cut where that is the smallest share.
            shares = [
                out / tiles / self.reach(axis)
                for axis, ((_, out, *_), tiles) in enumerate(zip(self.axes, self.tiles, strict=True))
            ]
            best = max(range(3), key=lambda axis: shares[axis])
            if shares[best] < 2 or self.axes[best][1] < 2 * self.tiles[best]:
                return
            self.tiles[best] *= 2

    def outs(self, axis: int) -> int:
        """Return the outputs of the largest tile along an axis."""
        return math.ceil(self.axes[axis][1] / self.tiles[axis])

    def strides(self, t: Tensor) -> list[int]:
        """Return a map's strides in bytes: samples, channels, axes."""
        spatial = [0 if axis is None else t.stride(2 + axis) for axis in self.order]
        return [stride * t.element_size() for stride in (*t.stride()[:2], *spatial)]

    def fields(self) -> list[int]:
        """Return what the kernels' table says of the axes."""
        return [value for axis, tiles in zip(self.axes, self.tiles, strict=True) for value in (*axis, tiles)]

    def taps(self, weight: Tensor) -> list[int]:
        """Return what the packing of a weight (C, 1, *K) is told: its strides in bytes and its kernel."""
        samples, _, *spatial = self.strides(weight)
        return [samples, *spatial, *(axis[2] for axis in self.axes)]


@lru_cache(4096)
def register_width(length: int, starts: int, most: int, met: tuple[int, int, int, int]) -> int:
    """Return how many neighbouring sums the registers should hold.

    The more there are, the rarer is the operand that they share, but the more of them wait while the first or the last
    of them alone meets the map. Sums i have met what lies from (low - i step) to (high - i step), rounded inwards to
    `each`, and at most `starts`.
    """
    low, high, step, each = met
    best, least = 1, math.inf
    for count in range(1, min(most, length) + 1):
        parts = math.ceil(length / count)
        work = 0
        for part in range(parts):
            first = part * count
            begin = max(0, math.ceil((low - (first + count - 1) * step) / each))
            end = min(starts, (high - first * step) // each + 1)
            # A sum waits four multiplications for itself.
            work += max(0, end - begin) * max(count + 1, 4) + _HANDING * count + _CALLING
        if work < least:
            best, least = count, work
    return best


def thread_count(work: float) -> int:
    """Return how many threads so many multiplications are worth."""
    return max(1, min(torch.get_num_threads(), int(work / _WORTH_A_THREAD) + 1))
