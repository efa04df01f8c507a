"""Logarithms of modified Bessel functions as formulas, written once for whatever can be added and multiplied: tensors,
values in a compiled kernel, numbers with derivatives.

`m` holds the elementary functions: log, log1p, exp, sqrt, floor, where, and half, which rounds to the digits of
float32. Loops have fixed lengths, so that a formula is straight arithmetic. Each holds in its region alone:

=============  ===========================  ==================================================
`far`          v^2 + x^2 >= FAR^2           uniform expansion of both, in 1 / sqrt(v^2 + x^2), given the exponent
`first`        below                        I: power series
`second_near`  below, x < SPLIT             K: Temme's series, then recurrence upwards in order
`second`       below, x >= SPLIT            K: integral
=============  ===========================  ==================================================
"""

import math
from collections.abc import Sequence
from typing import Any

from omniconv.ops.log_bessel._coefficients import (
    EXPANSION,
    NEAR_ROOT_SERIES,
    RECIPROCAL_GAMMA,
    ROOT,
    STIRLING,
)

__all__ = ["exponent", "exponent_near_root", "far", "first", "second", "second_near"]

SHIFT = 9
"""log Gamma(v + 1) is computed by Stirling's series at v + SHIFT."""
STEP, NODES = 9 / 64, 35
"""Distance and number of the nodes of K's integral that are enough for SPLIT <= x and v^2 + x^2 < FAR^2."""

_SINH = [1 / math.factorial(2 * k + 1) for k in range(9)]


def horner(coefficients: Sequence[Any], x: Any) -> Any:
    """Return the polynomial with coefficients from the constant on."""
    total = coefficients[-1]
    for c in reversed(coefficients[:-1]):
        total = total * x + c
    return total


def exponent(m: Any, v: Any, x: Any) -> Any:
    """Return s - v asinh(v / x) with s^2 = v^2 + x^2, away from its root."""
    s = m.sqrt(v * v + x * x)
    return s - v * m.log1p(v * (s + x + v) / (x * (s + x)))


def exponent_near_root(m: Any, v: Any, x: Any) -> Any:
    """Return the same near its root, where both terms are far larger than their difference."""
    # x - v z0: a product of numbers of half the digits is exact.
    upper = m.half(v)
    delta = ((x - ROOT[0] * upper) - ROOT[0] * (v - upper)) - ROOT[1] * v
    return delta * horner(NEAR_ROOT_SERIES, delta / v)


def far(m: Any, v: Any, x: Any, exponent: Any, second: bool, terms: int) -> Any:
    r"""Return :math:`\pm(s - v \operatorname{asinh}(v/x)) - \tfrac12 \log s + \sum_k (\pm t)^k c_k` and a constant."""
    s = m.sqrt(v * v + x * x)
    t = 1.0 / s
    y = (v * t) * (v * t)
    sign, constant = (-1.0, 0.5 * math.log(math.pi / 2)) if second else (1.0, -0.5 * math.log(2 * math.pi))
    t = sign * t
    series = t * horner([horner(row, y) for row in EXPANSION[:terms]], t)
    return sign * exponent - 0.5 * m.log(s) + (constant + series)


def first(m: Any, v: Any, x: Any, terms: int) -> Any:
    r"""Return :math:`v \log\tfrac x2 + \log \sum_k (x/2)^{2k} / (k!\, \Gamma(v + k + 1))`, over one denominator."""
    q = 0.25 * (x * x)
    total, product = 1.0, 1.0
    beyond = 1.0
    for k in range(terms, 0, -1):
        product = product * (v + float(k))
        total = product + total * (q * (1 / k))
        if k == SHIFT:
            beyond = product
    w = v + float(SHIFT)
    u = 1.0 / w
    gamma = (w - 0.5) * m.log(w) - w + (0.5 * math.log(2 * math.pi) + u * horner(STIRLING, u * u))
    return v * m.log(0.5 * x) - gamma + m.log(total / beyond)


def _temme(m: Any, mu: Any, x: Any, terms: int) -> tuple[Any, Any]:
    """Return K of order mu and x / 2 times K of order mu + 1."""
    square = mu * mu
    odd, even = -horner(RECIPROCAL_GAMMA[1::2], square), horner(RECIPROCAL_GAMMA[::2], square)
    plus, minus = even - mu * odd, even + mu * odd
    length = -m.log(0.5 * x)
    sigma = mu * length
    e = m.exp(sigma)
    back = 1.0 / e
    small = sigma * sigma < 1.0
    s = m.where(small, sigma, 0.0)
    sinh = m.where(small, horner(_SINH, s * s), 0.5 * (e - back) / m.where(small, 1.0, sigma))
    gammas = 1.0 / (plus * minus)
    f = (0.5 * (e + back) * odd + sinh * length * even) * gammas
    p, r = 0.5 * e * minus * gammas, 0.5 * back * plus * gammas
    c, q = 1.0, 0.25 * (x * x)
    k0, k1 = f, p
    for k in range(1, terms):
        inverse = 1.0 / (float(k * k) - square)
        f = (float(k) * f + p + r) * inverse
        p = p * ((k + mu) * inverse)
        r = r * ((k - mu) * inverse)
        c = c * (q * (1 / k))
        k0 = k0 + c * f
        k1 = k1 + c * (p - float(k) * f)
    return k0, k1


def second_near(m: Any, v: Any, x: Any, steps: int, terms: int) -> Any:
    """Return log K for x < SPLIT and orders that round to at most `steps`, with so many terms of Temme's series.

    Orders go up by K_{v+1} = K_{v-1} + (2 v / x) K_v.
    """
    count = m.floor(v + 0.5)
    mu, q = v - count, 0.25 * (x * x)
    # (x / 2)^k K of order mu + k neither over- nor underflows on the way.
    k0, k1 = _temme(m, mu, x, terms)
    for k in range(1, steps + 1):
        on = count > k - 0.5
        k0, k1 = m.where(on, k1, k0), m.where(on, (mu + float(k)) * k1 + q * k0, k1)
    return m.log(k0) - count * m.log(0.5 * x)


def second(m: Any, v: Any, x: Any) -> Any:
    r"""Return :math:`\log \int_0^\infty e^{-x \cosh t} \cosh(v t) dt` for x >= SPLIT by the trapezoidal rule.

    Its error falls exponentially with the number of nodes.
    """
    base = m.exp(v * STEP)
    power, total = 1.0, 0.5
    for j in range(1, NODES + 1):
        t = STEP * j
        power = power * base
        decay = x * (1.0 - math.cosh(t))
        total = total + m.exp(m.where(decay < -700.0, -700.0, decay)) * (0.5 * power + 0.5 / power)
    return m.log(total * STEP) - x
