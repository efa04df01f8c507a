"""Functions of a distance whose parameters may be tensors with gradients.

Any elementwise function of a tensor is one. Those of finite rank, f(x + y) = sum_r u_r(x) v_r(y), say so with
`factors`, which makes their products exact for all weights.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Cosine", "Exponential", "ExponentiatedPolynomial", "Polynomial", "Rational"]

Number = Tensor | float


def _horner(coefficients: Tensor, z: Tensor) -> Tensor:
    value = coefficients[-1].expand(z.shape)
    for coefficient in reversed(coefficients[:-1].unbind()):
        value = value * z + coefficient
    return value


@dataclass(frozen=True)
class Polynomial:
    r""":math:`f(z) = \sum_t a_t z^t`, of rank degree + 1 by the binomial theorem.

    Attributes:
        coefficients: (degree + 1), the constant first.
    """

    coefficients: Tensor

    def __call__(self, z: Tensor) -> Tensor:
        """Return f(z)."""
        return _horner(self.coefficients, z)

    def factors(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return u(z) and v(z), each `(*z, rank)`."""
        a = self.coefficients
        powers = torch.stack([z**t for t in range(len(a))], -1)
        # u_r(x) = sum_t a_t binomial(t, r) x^(t - r), again polynomials.
        mixed = [
            _horner(torch.stack([a[t] * math.comb(t, r) for t in range(r, len(a))]), z) for r in range(len(a))
        ]
        return torch.stack(mixed, -1), powers


@dataclass(frozen=True)
class Exponential:
    r""":math:`f(z) = s\, e^{\lambda z}`, of rank 1."""

    rate: Number
    scale: Number = 1.0

    def __call__(self, z: Tensor) -> Tensor:
        """Return f(z)."""
        return self.scale * torch.exp(self.rate * z)

    def factors(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return u(z) and v(z), each `(*z, 1)`."""
        power = torch.exp(self.rate * z)[..., None]
        return self.scale * power, power


@dataclass(frozen=True)
class Cosine:
    r""":math:`f(z) = \cos(\omega z + \varphi)`, of rank 2."""

    frequency: Number
    phase: Number = 0.0

    def __call__(self, z: Tensor) -> Tensor:
        """Return f(z)."""
        return torch.cos(self.frequency * z + self.phase)

    def factors(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return u(z) and v(z), each `(*z, 2)`."""
        angle = self.frequency * z
        shifted = angle + self.phase
        u = torch.stack([torch.cos(shifted), -torch.sin(shifted)], -1)
        return u, torch.stack([torch.cos(angle), torch.sin(angle)], -1)


@dataclass(frozen=True)
class Rational:
    r""":math:`f(z) = p(z) / q(z)` with polynomials of coefficients p and q, the constants first."""

    numerator: Tensor
    denominator: Tensor

    def __call__(self, z: Tensor) -> Tensor:
        """Return f(z)."""
        return _horner(self.numerator, z) / _horner(self.denominator, z)


@dataclass(frozen=True)
class ExponentiatedPolynomial:
    r""":math:`f(z) = e^{\sum_t a_t z^t}`, the paper's exponentiated quadratic with three coefficients.

    Attributes:
        coefficients: (degree + 1), the constant first.
    """

    coefficients: Tensor

    def __call__(self, z: Tensor) -> Tensor:
        """Return f(z)."""
        return torch.exp(_horner(self.coefficients, z))
