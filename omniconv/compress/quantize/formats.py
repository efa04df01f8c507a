"""Number formats of a few bits: which values a code can stand for, in units of the step.

A format is a sorted grid of values; a number's code is the index of its value there. What scales the grid to a
tensor is the `Quantizer`'s part.
"""

import abc
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

__all__ = ["Binary", "Codebook", "Float", "Format", "Integer", "PowerOfTwo", "nearest"]


def nearest(x: Tensor, grid: Tensor) -> Tensor:
    """Return the value of the sorted `grid` nearest to every entry of `x`.

    Of two equally near the one an even number of steps away from zero is taken, as IEEE 754 rounds.
    """
    right = torch.searchsorted(grid, x.contiguous()).clamp(1, len(grid) - 1)
    below, above = grid[right - 1], grid[right]
    down, up = x - below, above - x
    even = (right - torch.searchsorted(grid, grid.new_zeros(()))) % 2 == 0
    return torch.where((up < down) | ((up == down) & even), above, below)


class Format(abc.ABC):
    """Values that `bits` bits can stand for.

    Attributes:
        bits: of a code.
    """

    bits: int

    @abc.abstractmethod
    def grid(self) -> Tensor:
        """Return all values, ascending."""

    def round(self, x: Tensor, grid: Tensor) -> Tensor:
        """Return the values of `grid` nearest to `x`; what lies outside becomes the first or the last."""
        return nearest(x, grid)


@dataclass(frozen=True)
class Integer(Format):
    """Whole numbers: -2^(k-1) to 2^(k-1) - 1, or 0 to 2^k - 1 if not `signed`."""

    bits: int = 8
    signed: bool = True

    def __post_init__(self) -> None:
        if not 2 - (not self.signed) <= self.bits <= 16:
            raise ValueError(
                f"bits must lie between 2 (unsigned: 1) and 16: got {self.bits}; or take Binary()"
            )

    def grid(self) -> Tensor:
        """Return all values, ascending."""
        low = -(2 ** (self.bits - 1)) if self.signed else 0
        return torch.arange(low, low + 2**self.bits, dtype=torch.float32)

    def round(self, x: Tensor, grid: Tensor) -> Tensor:
        """Return the whole numbers nearest to `x`, ties to even, within the range."""
        return x.round().clamp(grid[0], grid[-1])


@dataclass(frozen=True)
class Float(Format):
    r"""Floating-point numbers of a sign, `exponent` and `mantissa` bits, with subnormals and saturation.

    .. math:: \pm 2^{e - b} (1 + m\,2^{-M}), \quad \pm 2^{1 - b}\, m\,2^{-M} \text{ for } e = 0, \quad
              b = 2^{E-1} - 1

    Args:
        exponent: bits E, at least 1.
        mantissa: bits M.
        reserved: codes a sign that stand for no number, from the top: 0 in E2M1, 1 in E4M3 (`float8_e4m3fn`, its
            NaN), 2^M in the formats of IEEE 754, such as E5M2 and bfloat16.
    """

    exponent: int
    mantissa: int
    reserved: int = 0

    def __post_init__(self) -> None:
        if self.exponent < 1 or self.mantissa < 0 or self.bits > 16:
            raise ValueError(f"a float has 1 or more exponent bits and 16 bits at most: got {self}")

    @property
    def bits(self) -> int:  # type: ignore[override]
        """Bits of a code, the sign's among them."""
        return 1 + self.exponent + self.mantissa

    def grid(self) -> Tensor:
        """Return all values, ascending; zero has two codes and stands here once."""
        code = torch.arange(2 ** (self.exponent + self.mantissa) - self.reserved, dtype=torch.float64)
        field, fraction = code // 2**self.mantissa, code % 2**self.mantissa / 2**self.mantissa
        power = field.clamp(min=1) - (2 ** (self.exponent - 1) - 1)
        value = (fraction + (field > 0)) * 2.0**power
        return torch.cat([-value[1:].flip(0), value]).float()


@dataclass(frozen=True)
class PowerOfTwo(Format):
    """Zero and signed powers of two from 1 downwards, so that products are shifts."""

    bits: int = 4

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 7:
            raise ValueError(f"bits of powers of two must lie between 2 and 7: got {self.bits}")

    def grid(self) -> Tensor:
        """Return all values, ascending."""
        value = 2.0 ** -torch.arange(2 ** (self.bits - 1) - 1, dtype=torch.float32)
        return torch.cat([-value, value.new_zeros(1), value.flip(0)])


@dataclass(frozen=True)
class Codebook(Format):
    """The 2^k values that k-means finds, at most 1 in magnitude: the grid of least squared error."""

    bits: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits of a codebook must lie between 1 and 8: got {self.bits}")

    def grid(self) -> Tensor:
        """Return equally spaced values, from which `fit` starts where a tensor has too few different ones."""
        return torch.linspace(-1, 1, 2**self.bits)

    def fit(self, x: Tensor, iterations: int = 30) -> Tensor:
        """Return the grid for `x` by Lloyd's algorithm from its quantiles."""
        ordered = x.detach().double().flatten().sort().values
        sums = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
        size = 2**self.bits
        grid = ordered[((torch.arange(size, device=x.device) + 0.5) / size * len(ordered)).long()]
        for _ in range(iterations):
            # On a line a cluster lies between the middles of neighbouring centres.
            edges = torch.searchsorted(ordered, (grid[1:] + grid[:-1]) / 2)
            edges = torch.cat([edges.new_zeros(1), edges, edges.new_tensor([len(ordered)])])
            counts = edges.diff()
            means = sums[edges].diff() / counts.clamp(min=1)
            grid = torch.where(counts > 0, means, grid).sort().values
        return grid.to(x.dtype)


@dataclass(frozen=True)
class Binary(Format):
    """-1 and 1; `range="mse"` scales them best."""

    bits: ClassVar[int] = 1  # type: ignore[misc]

    def grid(self) -> Tensor:
        """Return both values."""
        return torch.tensor([-1.0, 1.0])
