"""Numbers of the expansions, and where each of them holds."""

from fractions import Fraction

import numpy as np

FAR = 25.0
"""From v^2 + x^2 = FAR^2 on the uniform expansion holds to 4e-15 with `TERMS` terms."""
TERMS = 13
FARTHER = 300.0
"""From here on `FEW` terms do."""
FEW = 5
SPLIT = 2.0
"""Where, short of FAR, K's and I's series become too long."""
SHORT, LONG = 13, 42
"""Terms of I's power series that are enough below SPLIT and below FAR."""
TINY = 0.0625
TEMME, TEMME_TINY = 13, 5
"""Terms of Temme's series that are enough below SPLIT and below TINY."""

# The root of sqrt(1 + z^2) - asinh(1 / z): half of its digits, so that products with as many are exact, and the rest.
ROOT = (0.6627433896064758, 2.9742705750896616e-08)
NEAR_ROOT = 0.03
"""How far from the root, in z, its Taylor series is used."""

# Taylor series of 1 / Gamma(1 + z).
RECIPROCAL_GAMMA = (
    1.0, 0.57721566490153286061, -0.65587807152025388108, -0.042002635034095235529, 0.1665386113822914895,
    -0.042197734555544336748, -0.0096219715278769735621, 0.0072189432466630995424, -0.0011651675918590651121,
    -0.00021524167411495097282, 0.00012805028238811618615, -0.000020134854780788238656,
    -1.2504934821426706573e-6, 1.1330272319816958824e-6, -2.0563384169776071035e-7, 6.1160951044814158179e-9,
    5.0020076444692229301e-9, -1.1812745704870201446e-9, 1.0434267116911005105e-10,
)  # fmt: skip

# Stirling's series of log Gamma(w) in odd powers of 1 / w.
STIRLING = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360, 1 / 156)


def _expansion(terms: int) -> tuple[tuple[float, ...], ...]:
    r"""Return the coefficients :math:`c_k` of log I's uniform expansion, polynomials in y, k = 1, 2, ...

    .. math::
        \log \sum_k U_k(p) / v^k = \sum_k t^k c_k(y), \qquad t = 1 / \sqrt{v^2 + x^2},\; y = p^2 = (v t)^2

    with Debye's polynomials :math:`U_{k+1} = \tfrac12 p^2 (1 - p^2) U_k' + \tfrac18 \int_0^p (1 - 5 q^2) U_k dq`.
    """
    # U_k = p^k times a polynomial in p^2, and so is the logarithm's coefficient.
    debye = [[Fraction(1)]]
    for k in range(terms):
        new = [Fraction(0)] * (k + 2)
        for i, c in enumerate(debye[k]):
            power = k + 2 * i
            new[i] += c * power / 2 + c / (8 * (power + 1))
            new[i + 1] -= c * power / 2 + 5 * c / (8 * (power + 3))
        debye.append(new)
    logs: list[list[Fraction]] = [[]]
    for k in range(1, terms + 1):
        row = list(debye[k])
        for j in range(1, k):
            for a, c in enumerate(logs[j]):
                for b, u in enumerate(debye[k - j]):
                    row[a + b] -= Fraction(j, k) * c * u
        logs.append(row)
    return tuple(tuple(float(c) for c in row) for row in logs[1:])


def _near_root(terms: int) -> tuple[float, ...]:
    r"""Return the Taylor series of :math:`\eta(z_0 + d) / d` at the root, with :math:`\eta' = \sqrt{1 + z^{-2}}`."""
    z = sum(ROOT)
    square = [(-1) ** n * (n + 1) / z ** (n + 2) for n in range(terms)]
    root = [np.sqrt(1 + square[0])]
    for n in range(1, terms):
        root.append((square[n] - sum(root[i] * root[n - i] for i in range(1, n))) / (2 * root[0]))
    return tuple(float(c / (n + 1)) for n, c in enumerate(root))


EXPANSION = _expansion(TERMS)
NEAR_ROOT_SERIES = _near_root(12)
