"""What a deformable convolution costs on an embedded accelerator, and a simulation that counts it.

Paper: Huang et al., Algorithm-hardware Co-design for Deformable Convolution, https://arxiv.org/abs/2002.08357. Free
offsets send every sample to external memory at random; bounded ones let rows stream once, in order, through a buffer.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["DeformCost", "LineBufferTrace", "deform_cost", "simulate_line_buffer"]


@dataclass(frozen=True)
class DeformCost:
    """Cost of one deformable convolution of one map; a read is that of all channels of a pixel.

    Attributes:
        macs: multiply-adds of the kernels.
        interpolation_macs: multiply-adds of the bilinear samples.
        random_reads: reads of external memory at the offsets' places.
        sequential_reads: reads of external memory in order.
        buffer_reads: reads of the line buffer.
        buffer_rows: rows of the map that the line buffer holds; 0 without one.
        random_bytes: what the random reads move.
        sequential_bytes: what the sequential reads, the offsets and the output move.
    """

    macs: int
    interpolation_macs: int
    random_reads: int
    sequential_reads: int
    buffer_reads: int
    buffer_rows: int
    random_bytes: int
    sequential_bytes: int

    def latency(self, *, bandwidth: float, macs: float, random_penalty: float = 4.0) -> float:
        """Return the seconds that moving and then computing take, one after the other.

        Args:
            bandwidth: bytes a second of external memory, in order.
            macs: multiply-adds a second.
            random_penalty: how many times as long a random byte takes.
        """
        moved = self.sequential_bytes + random_penalty * self.random_bytes
        return moved / bandwidth + (self.macs + self.interpolation_macs) / macs


def deform_cost(
    in_channels: int,
    out_channels: int,
    height: int,
    width: int,
    kernel_size: int = 3,
    *,
    depthwise: bool = False,
    square: bool = False,
    bound: float | None = None,
    rounded: bool = False,
    bits: int = 8,
) -> DeformCost:
    """Return the cost of a deformable convolution of stride 1, of the forms of `HardwareDeformConv2d`.

    The convolution that finds the offsets is not in it, and neither are the weights, which stay on the chip.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        height: of the map, in pixels.
        width: of the map, in pixels.
        kernel_size: pixels along a side, odd.
        depthwise: 1x1 convolution and one deformable kernel a channel.
        square: one offset a position instead of two a tap.
        bound: largest offset, or None.
        rounded: whole offsets.
        bits: of a number, map and offset alike.
    """
    pixels, taps, corners = height * width, kernel_size**2, 1 if rounded else 4
    sampled = out_channels if depthwise else in_channels
    kernels = (in_channels + taps) * out_channels if depthwise else taps * in_channels * out_channels
    samples = pixels * taps * corners
    buffered = bound is not None
    offsets = 1 if square else 2 * taps
    moved = pixels * (offsets + out_channels) + (pixels * sampled if buffered else 0)
    return DeformCost(
        macs=pixels * kernels,
        interpolation_macs=0 if rounded else samples * sampled,
        random_reads=0 if buffered else samples,
        sequential_reads=pixels if buffered else 0,
        buffer_reads=samples if buffered else 0,
        buffer_rows=_reach(kernel_size, bound) * 2 + 1 if bound is not None else 0,
        random_bytes=0 if buffered else samples * sampled * bits // 8,
        sequential_bytes=moved * bits // 8,
    )


def _reach(kernel_size: int, bound: float) -> int:
    return math.ceil(bound) + kernel_size // 2


@dataclass(frozen=True)
class LineBufferTrace:
    """What a simulation did.

    Attributes:
        samples: the samples (K, C, H, W).
        random_reads: of external memory, at the offsets' places.
        sequential_reads: of external memory, in order.
        buffer_reads: of the line buffer.
    """

    samples: NDArray[np.float64]
    random_reads: int
    sequential_reads: int
    buffer_reads: int


class _Memory:
    """Rows of a map that may be read pixel by pixel; those beyond its border are zero. Counts what it is asked for."""

    def __init__(self, rows: int, width: int, channels: int) -> None:
        # A ring: a new row takes the place of the oldest.
        self.rows = np.zeros((rows, width, channels))
        self.held = np.full(rows, -1)
        self.reads = 0

    def write(self, row: int, values: NDArray[np.float64]) -> None:
        self.held[row % len(self.held)] = row
        self.rows[row % len(self.held)] = values

    def read(self, rows: NDArray[np.int64], columns: NDArray[np.int64], height: int) -> NDArray[np.float64]:
        self.reads += rows.size
        inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < self.rows.shape[1])
        slot = rows % len(self.held)
        missing = rows[inside & (self.held[slot] != rows)]
        if missing.size:
            raise ValueError(f"row {missing[0]} is not in the line buffer; bound the offsets")
        values = self.rows[slot, columns.clip(0, self.rows.shape[1] - 1)]
        return np.where(inside[..., None], values, 0)


def simulate_line_buffer(
    x: NDArray[np.float64],
    offset: NDArray[np.float64],
    kernel_size: int = 3,
    *,
    bound: float | None = None,
    rounded: bool = False,
) -> LineBufferTrace:
    """Sample a map as the accelerator does, row by row, and count its reads.

    With a bound, samples are read from a buffer of as many rows as `deform_cost` says and from nowhere else.

    Args:
        x: the map (C, H, W).
        offset: (2 K, H, W), a row and a column offset for every tap.
        kernel_size: pixels along a side, odd.
        bound: largest offset, or None to read external memory at the offsets' places.
        rounded: offsets are whole, so that one pixel is read a sample instead of four.

    Raises:
        ValueError: if an offset exceeds the bound.
    """
    channels, height, width = x.shape
    reach = height if bound is None else _reach(kernel_size, bound)
    memory = _Memory(height if bound is None else 2 * reach + 1, width, channels)
    taps = np.stack(np.meshgrid(*[np.arange(kernel_size) - kernel_size // 2] * 2, indexing="ij"), -1).reshape(
        -1, 2
    )
    samples = np.zeros((len(taps), channels, height, width))
    loaded = 0
    for i in range(height):
        for row in range(loaded, min(i + reach + 1, height)):
            memory.write(row, x[:, row].T)
            loaded = row + 1
        moved = offset[:, i].reshape(-1, 2, width) + taps[:, :, None]
        y, z = i + moved[:, 0], np.arange(width) + moved[:, 1]
        for v, u in ((0, 0),) if rounded else ((0, 0), (0, 1), (1, 0), (1, 1)):
            row, column = np.floor(y).astype(np.int64) + v, np.floor(z).astype(np.int64) + u
            share = (1 - np.abs(y - row)) * (1 - np.abs(z - column))
            # A sample on the last row of the buffer has no share in the row after it.
            values = memory.read(np.where(share > 0, row, -1), column, height)
            samples[:, :, i] += (share[..., None] * values).transpose(0, 2, 1)
    reads = memory.reads
    if bound is None:
        return LineBufferTrace(samples, reads, 0, 0)
    return LineBufferTrace(samples, 0, loaded * width, reads)
