r"""Why a network takes the time it takes: operations over peak and efficiency, kernel by kernel.

Paper: Lavin, On the Efficiency of Convolutional Neural Networks, https://arxiv.org/abs/2404.03617.

.. math:: t = \frac{\mathrm{operations}}{\mathrm{peak} \cdot \mathrm{efficiency}}

A roofline bounds the efficiency of one kernel by its arithmetic intensity. A waterline shows a sequence of kernels:
each as wide as its share of the operations and as high as the inverse of its efficiency, so that the area is the
latency, and the water level is the efficiency of the whole. Where a block is one kernel, `block_traffic` counts what
it moves when its tiles stay in the cache, and what its layers move one by one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import TYPE_CHECKING, Literal

from torch import nn

from omniconv.design.cost import LayerCost, layer_costs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Block",
    "Kernel",
    "Machine",
    "Waterline",
    "block_traffic",
    "efficiency_gap",
    "network_waterline",
    "plot_roofline",
]


@dataclass(frozen=True)
class Machine:
    """What a machine can do at best.

    Attributes:
        peak: operations a second; a multiply-add is one.
        bandwidth: bytes a second to and from memory.
    """

    peak: float
    bandwidth: float

    def __post_init__(self) -> None:
        if self.peak <= 0 or self.bandwidth <= 0:
            raise ValueError(f"peak and bandwidth must be positive: got {self.peak} and {self.bandwidth}")

    def efficiency(self, intensity: float) -> float:
        """Return the roofline: the share of the peak that a kernel of so many operations a byte can reach."""
        return min(1.0, intensity * self.bandwidth / self.peak)


@dataclass(frozen=True)
class Kernel:
    """One kernel of a network.

    Attributes:
        name: of it.
        operations: multiply-adds, or where there are none the entries that it writes.
        bytes: read and written.
        seconds: that it takes; None to take those of the roofline.
    """

    name: str
    operations: float
    bytes: float
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.operations <= 0 or self.bytes <= 0:
            raise ValueError(f"{self.name}: operations and bytes must be positive")

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.operations / self.bytes

    @staticmethod
    def of(row: LayerCost) -> "Kernel":
        """Return the kernel of a counted operator."""
        return Kernel(row.name or row.op, row.macs or max(row.outputs, row.inputs), row.bytes)


@dataclass(frozen=True)
class Waterline:
    """The kernels of a network over their shares of its operations (`paper <https://arxiv.org/abs/2404.03617>`_).

    Attributes:
        kernels: in the order in which they run.
        machine: whose peak counts as efficiency one.
    """

    kernels: tuple[Kernel, ...]
    machine: Machine

    def __post_init__(self) -> None:
        if not self.kernels:
            raise ValueError("a waterline needs at least one kernel")

    @property
    def operations(self) -> float:
        """Operations of all kernels."""
        return sum(kernel.operations for kernel in self.kernels)

    def efficiency(self, kernel: Kernel) -> float:
        """Return the share of the peak that a kernel reaches, measured or by the roofline."""
        if kernel.seconds is None:
            return self.machine.efficiency(kernel.intensity)
        return kernel.operations / (self.machine.peak * kernel.seconds)

    def seconds(self, kernel: Kernel) -> float:
        """Return the latency of a kernel."""
        if kernel.seconds is not None:
            return kernel.seconds
        return max(kernel.operations / self.machine.peak, kernel.bytes / self.machine.bandwidth)

    def columns(self) -> list[tuple[float, float]]:
        """Return for each kernel the share of operations at which it ends, and the inverse of its efficiency."""
        done, columns = 0.0, []
        for kernel in self.kernels:
            done += kernel.operations
            columns.append((done / self.operations, 1 / self.efficiency(kernel)))
        return columns

    @property
    def latency(self) -> float:
        """Seconds of the network: the area of the columns in units of the ideal latency."""
        edges = [0.0, *(end for end, _ in self.columns())]
        area = sum(
            (right - left) * height
            for (left, right), (_, height) in zip(pairwise(edges), self.columns(), strict=True)
        )
        return area * self.operations / self.machine.peak

    @property
    def level(self) -> float:
        """Computational efficiency of the network: ideal over actual latency."""
        return self.operations / self.machine.peak / self.latency

    def plot(self) -> "Figure":
        """Draw the columns and the level."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.subplots()
        left = 0.0
        for kernel, (right, height) in zip(self.kernels, self.columns(), strict=True):
            axes.bar(
                left, height, right - left, align="edge", linewidth=0.3, edgecolor="white", label=kernel.name
            )
            left = right
        axes.axhline(1 / self.level, color="black", linestyle="--", label="_level")
        axes.axhline(1, color="grey", linewidth=0.8, label="_peak")
        axes.set(xlim=(0, 1), ylim=0, xlabel="share of operations", ylabel="latency over ideal (area: total)")
        axes.set_title(f"{1e3 * self.latency:.3g} ms, efficiency {self.level:.1%}")
        return figure


def network_waterline(model: nn.Module, input_shape: tuple[int, ...], machine: Machine) -> Waterline:
    """Return the waterline of a network by the roofline of every operator, each moving its tensors once."""
    return Waterline(tuple(map(Kernel.of, layer_costs(model, input_shape))), machine)


def efficiency_gap(measured: Mapping[str, float], ideal: Mapping[str, float]) -> dict[str, float]:
    """Return by network how many times longer it takes than its operations at peak would, least first.

    Args:
        measured: seconds by name.
        ideal: operations over peak by name.
    """
    return dict(sorted(((name, measured[name] / ideal[name]) for name in measured), key=lambda pair: pair[1]))


@dataclass(frozen=True)
class Block:
    """A residual block of a grouped convolution and two pointwise ones.

    Attributes:
        kind: "convfirst" (grouped, expand, project) or "mbconv" (expand, grouped, project).
        channels: C, outside.
        expansion: hidden channels are so many times C.
        kernel_size: of the grouped convolution.
        group_width: channels of a group; 1 for a depthwise convolution.
    """

    kind: Literal["convfirst", "mbconv"] = "convfirst"
    channels: int = 64
    expansion: int = 4
    kernel_size: int = 3
    group_width: int = 8

    @property
    def hidden(self) -> int:
        """Channels between the pointwise convolutions."""
        return self.channels * self.expansion

    @property
    def weights(self) -> int:
        """Entries of all weights and biases."""
        spatial = self.channels if self.kind == "convfirst" else self.hidden
        grouped = spatial * (self.group_width * self.kernel_size**2 + 1)
        return grouped + self.channels * self.hidden * 2 + self.hidden + self.channels


def block_traffic(
    block: Block, height: int, width: int, *, tile: tuple[int, int] | None = None, itemsize: int = 4
) -> int:
    """Return the bytes that a block moves to and from memory.

    Args:
        block: which one.
        height: of the map.
        width: of the map.
        tile: rows and columns of output that one fused kernel computes at a time, intermediate maps staying in the
            cache: each tile reads its input with the halo of the convolution, which overlaps its neighbours', and
            all weights. None for layer by layer: every convolution and the sum read and write whole maps.
        itemsize: bytes of an entry.
    """
    pixels = height * width
    if tile is None:
        outside, hidden = block.channels * pixels, block.hidden * pixels
        spatial = outside if block.kind == "convfirst" else hidden
        # The convolution's own map in and out, the expansion, the activation, the projection, the sum.
        moved = 2 * spatial + (outside + hidden) + 2 * hidden + (hidden + outside) + 3 * outside
        return itemsize * (moved + block.weights)
    reach = block.kernel_size // 2
    rows, columns = _extents(height, tile[0], reach), _extents(width, tile[1], reach)
    loaded = block.channels * sum(rows) * sum(columns)
    return itemsize * (loaded + len(rows) * len(columns) * block.weights + block.channels * pixels)


def _extents(size: int, tile: int, reach: int) -> list[int]:
    """Return how many lines each tile reads, the halo cut off at the border."""
    if tile < 1:
        raise ValueError(f"tile must be positive: got {tile}")
    starts = [tile * index for index in range(ceil(size / tile))]
    return [min(size, start + tile + reach) - max(0, start - reach) for start in starts]


def plot_roofline(kernels: Sequence[Kernel], machine: Machine) -> "Figure":
    """Draw the roofline of a machine, and below it the kernels whose time is known."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    timed = [(kernel, kernel.operations / kernel.seconds) for kernel in kernels if kernel.seconds]
    ridge = machine.peak / machine.bandwidth
    lowest = min([kernel.intensity for kernel, _ in timed], default=ridge / 100)
    highest = max([kernel.intensity for kernel, _ in timed], default=ridge)
    edges = [min(lowest, ridge) / 2, ridge, max(highest, ridge) * 2]
    axes.loglog(edges, [machine.peak * machine.efficiency(edge) for edge in edges], color="black")
    for kernel, rate in timed:
        axes.plot(kernel.intensity, rate, "o", label=kernel.name)
    axes.set(xlabel="operations a byte", ylabel="operations a second")
    return figure
