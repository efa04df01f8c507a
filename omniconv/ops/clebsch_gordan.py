"""Clebsch-Gordan coefficients: how products of spherical harmonics of two degrees make those of a third.

By Racah's formula, whose sum is exact in integers, and a change to real harmonics, those of
`omniconv.ops.spherical_harmonics`.
"""

import functools
import math
from fractions import Fraction

import numpy as np

__all__ = ["clebsch_gordan", "complex_clebsch_gordan"]


def complex_clebsch_gordan(j1: int, m1: int, j2: int, m2: int, j: int, m: int) -> float:
    r"""Return :math:`\langle j_1 m_1 j_2 m_2 | j m \rangle` with the phases of Condon and Shortley.

    Args:
        j1: first degree.
        m1: first order.
        j2: second degree.
        m2: second order.
        j: coupled degree.
        m: coupled order.
    """
    if m1 + m2 != m or not abs(j1 - j2) <= j <= j1 + j2 or abs(m1) > j1 or abs(m2) > j2 or abs(m) > j:
        return 0.0
    f = math.factorial
    square = Fraction((2 * j + 1) * f(j + j1 - j2) * f(j - j1 + j2) * f(j1 + j2 - j), f(j1 + j2 + j + 1))
    square *= f(j + m) * f(j - m) * f(j1 - m1) * f(j1 + m1) * f(j2 - m2) * f(j2 + m2)
    total = Fraction(0)
    for k in range(max(0, j2 - j - m1, j1 - j + m2), min(j1 + j2 - j, j1 - m1, j2 + m2) + 1):
        parts = (k, j1 + j2 - j - k, j1 - m1 - k, j2 + m2 - k, j - j2 + m1 + k, j - j1 - m2 + k)
        total += Fraction((-1) ** k, math.prod(f(part) for part in parts))
    # The square is a number of one size whatever the degrees, unlike its factors.
    return math.copysign(math.sqrt(square * total * total), total)


def _to_real(degree: int) -> np.ndarray:
    """Return the unitary matrix that makes real harmonics (rows) of complex ones (columns)."""
    matrix = np.zeros((2 * degree + 1, 2 * degree + 1), complex)
    matrix[degree, degree] = 1
    for m in range(1, degree + 1):
        sign = (-1) ** m
        matrix[degree + m, degree + m], matrix[degree + m, degree - m] = sign, 1
        matrix[degree - m, degree + m], matrix[degree - m, degree - m] = -1j * sign, 1j
        matrix[[degree + m, degree - m]] /= math.sqrt(2)
    return matrix


@functools.cache
def clebsch_gordan(first: int, second: int, third: int) -> np.ndarray:
    r"""Return the coefficients that couple two degrees of real harmonics to a third one.

    .. math:: z_c = \sum_{ab} C_{abc}\, x_a y_b

    turns with the third degree if x and y turn with the first and the second. :math:`\sum_{ab} C_{abc}^2 = 1`; for an
    odd sum of degrees, where the coefficients between real harmonics are imaginary, i is taken off.

    Args:
        first: degree of x.
        second: degree of y.
        third: degree of z.

    Returns:
        (2 first + 1, 2 second + 1, 2 third + 1), float64.
    """
    coupled = np.zeros((2 * first + 1, 2 * second + 1, 2 * third + 1))
    for m1 in range(-first, first + 1):
        for m2 in range(max(-second, -third - m1), min(second, third - m1) + 1):
            value = complex_clebsch_gordan(first, m1, second, m2, third, m1 + m2)
            coupled[m1 + first, m2 + second, m1 + m2 + third] = value
    a, b, c = _to_real(first), _to_real(second), _to_real(third)
    real = np.einsum("xyz,ax,by,cz->abc", coupled, a.conj(), b.conj(), c, optimize=True)
    return real.imag if (first + second + third) % 2 else real.real
