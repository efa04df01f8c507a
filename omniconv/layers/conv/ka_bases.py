"""Families of univariate functions for Kolmogorov-Arnold layers: polynomials, B-splines, Gaussians and wavelets.

A basis is a small frozen object: how many functions it has, the numbers that are learned of it, and their values at a
tensor, one tensor a function. Papers: Drokin, https://arxiv.org/abs/2407.01092, and for the B-splines Liu et al., KAN,
https://arxiv.org/abs/2404.19756.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

__all__ = ["BSplines", "Basis", "Bernstein", "Gaussians", "Polynomials", "Wavelets"]


class Basis(Protocol):
    """What a Kolmogorov-Arnold layer asks of a basis."""

    @property
    def size(self) -> int:
        """Number of functions."""
        ...

    @property
    def start(self) -> tuple[float, ...]:
        """Where the learned numbers begin; () if nothing is learned."""
        ...

    def __call__(self, x: Tensor, learned: Tensor) -> list[Tensor]:
        """Return the value of every function at `x`."""
        ...


Family = Literal["chebyshev", "fibonacci", "gram", "hermite", "jacobi", "legendre", "lucas"]

# Family: n -> (a, c) of P_{n+1} = a x P_n - c P_{n-1}; P_0 is 1, but 2 for Lucas.
_RECURRENCES: dict[Family, Callable[[int], tuple[float, float]]] = {
    "chebyshev": lambda n: (2.0 if n else 1.0, 1.0),
    "fibonacci": lambda n: (1.0, -1.0),
    "gram": lambda n: (1.0, n * n / (4 * n * n - 1)),
    "hermite": lambda n: (2.0, 2.0 * n),
    "jacobi": lambda n: ((2 * n + 3) * (n + 2) / ((n + 1) * (n + 3)), (n + 2) / (n + 3)),
    "legendre": lambda n: ((2 * n + 1) / (n + 1), n / (n + 1)),
    "lucas": lambda n: (1.0 if n else 0.5, -1.0),
}


@dataclass(frozen=True)
class Polynomials:
    r"""Polynomials of degree 0 to d at :math:`t = \tanh x`, by the recurrence of their family.

    .. math:: P_{n+1}(t) = a_n t\, P_n(t) - c_n P_{n-1}(t)

    Attributes:
        family: "chebyshev" (first kind), "fibonacci", "hermite" (physicists'), "jacobi" (alpha = beta = 1),
            "legendre", "lucas", or "gram", of leading coefficient one, whose c are learned and start as Legendre's.
        degree: d.
    """

    family: Family
    degree: int = 3

    def __post_init__(self) -> None:
        if self.family not in _RECURRENCES:
            raise ValueError(f"family must be one of {sorted(_RECURRENCES)}: got {self.family!r}")

    @property
    def size(self) -> int:
        """Number of polynomials."""
        return self.degree + 1

    @property
    def start(self) -> tuple[float, ...]:
        """The coefficients c of Gram polynomials."""
        if self.family != "gram":
            return ()
        return tuple(_RECURRENCES["gram"](n)[1] for n in range(1, self.degree))

    def __call__(self, x: Tensor, learned: Tensor) -> list[Tensor]:
        """Return the value of every polynomial."""
        t = x.tanh()
        values = [torch.full_like(t, 2.0 if self.family == "lucas" else 1.0)]
        for n in range(self.degree):
            a, c = _RECURRENCES[self.family](n)
            value = a * t * values[-1]
            if n > 0:
                value = value - (learned[n - 1] if self.family == "gram" else c) * values[-2]
            values.append(value)
        return values


@dataclass(frozen=True)
class Bernstein:
    r"""Bernstein polynomials :math:`\binom{d}{i} t^i (1 - t)^{d - i}` at :math:`t = (1 + \tanh x) / 2`.

    Attributes:
        degree: d.
    """

    degree: int = 3

    @property
    def size(self) -> int:
        """Number of polynomials."""
        return self.degree + 1

    @property
    def start(self) -> tuple[float, ...]:
        """Nothing is learned."""
        return ()

    def __call__(self, x: Tensor, learned: Tensor) -> list[Tensor]:
        """Return the value of every polynomial."""
        t, d = (1 + x.tanh()) / 2, self.degree
        return [math.comb(d, i) * t**i * (1 - t) ** (d - i) for i in range(d + 1)]


@dataclass(frozen=True)
class BSplines:
    r"""B-splines on a uniform grid; they sum to one inside it and vanish far from it.

    .. math:: B_{i,p}(u) = \frac{(u - i)\, B_{i,p-1}(u) + (i + p + 1 - u)\, B_{i+1,p-1}(u)}{p}

    with u counting grid steps from the first knot.

    Attributes:
        grid: intervals G.
        order: degree p of the pieces; there are G + p functions.
        low: where the grid begins.
        high: where it ends.
    """

    grid: int = 5
    order: int = 3
    low: float = -1.0
    high: float = 1.0

    @property
    def size(self) -> int:
        """Number of splines."""
        return self.grid + self.order

    @property
    def start(self) -> tuple[float, ...]:
        """Nothing is learned."""
        return ()

    def __call__(self, x: Tensor, learned: Tensor) -> list[Tensor]:
        """Return the value of every spline."""
        u = (x - self.low) * (self.grid / (self.high - self.low)) + self.order
        floor = u.floor()
        values = [(floor == i).to(u.dtype) for i in range(self.grid + 2 * self.order)]
        for p in range(1, self.order + 1):
            values = [
                ((u - i) * values[i] + (i + p + 1 - u) * values[i + 1]) / p for i in range(len(values) - 1)
            ]
        return values


@dataclass(frozen=True)
class Gaussians:
    r"""Gaussians :math:`e^{-((x - m_i) / h)^2}` at centres m a step h apart (FastKAN).

    Attributes:
        count: how many.
        low: first centre.
        high: last centre.
    """

    count: int = 8
    low: float = -2.0
    high: float = 2.0

    @property
    def size(self) -> int:
        """Number of Gaussians."""
        return self.count

    @property
    def start(self) -> tuple[float, ...]:
        """Nothing is learned."""
        return ()

    def __call__(self, x: Tensor, learned: Tensor) -> list[Tensor]:
        """Return the value of every Gaussian."""
        step = (self.high - self.low) / (self.count - 1)
        return [(-(((x - (self.low + i * step)) / step) ** 2)).exp() for i in range(self.count)]


@dataclass(frozen=True)
class Wavelets:
    r"""Mexican hats :math:`\frac{2}{\sqrt 3\, \pi^{1/4}} (1 - t^2)\, e^{-t^2 / 2}` at :math:`t = s_i (x - m_i)`.

    Scales s start as one and centres m evenly from -1 to 1; both are learned.

    Attributes:
        count: how many.
    """

    count: int = 4

    @property
    def size(self) -> int:
        """Number of wavelets."""
        return self.count

    @property
    def start(self) -> tuple[float, ...]:
        """Centres, then scales."""
        centres = (2 * i / max(1, self.count - 1) - 1 for i in range(self.count))
        return (*centres, *(1.0,) * self.count)

    def __call__(self, x: Tensor, learned: Tensor) -> list[Tensor]:
        """Return the value of every wavelet."""
        height = 2 / (math.sqrt(3) * math.pi**0.25)
        values = []
        for i in range(self.count):
            square = (learned[self.count + i] * (x - learned[i])) ** 2
            values.append(height * (1 - square) * (-square / 2).exp())
        return values
