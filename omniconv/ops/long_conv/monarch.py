r"""The Fourier transform as products with small matrices, two or three of them: what tensor cores run.

The Fourier matrix of n = n1 n2 points factors (FlashButterfly of Fu et al., https://arxiv.org/abs/2302.06646).
With time t = n2 t1 + t2 and frequency f = f1 + n1 f2,

.. math:: X_{f_1 + n_1 f_2} = \sum_{t_2} e^{-2 \pi i t_2 f_2 / n_2} \Bigl( e^{-2 \pi i t_2 f_1 / n}
    \sum_{t_1} e^{-2 \pi i t_1 f_1 / n_1} x_{n_2 t_1 + t_2} \Bigr)

and the sum over :math:`t_2`, a transform of n2 points, factors again. The inverse takes the factors in turn from
the other side, so a convolution never sorts the frequencies. Since kernels are real, the two halves of a batch go
as real and imaginary parts of one complex signal.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["factors", "fourier", "inverse", "transform"]


def factors(n: int, order: int | None = None) -> list[int]:
    """Return `order` factors of n as equal as can be, the largest last; two up to 4096 points and three beyond."""
    order = (2 if n <= 4096 else 3) if order is None else order
    if order == 1:
        return [n]
    first = max(d for d in range(1, round(n ** (1 / order)) + 1) if n % d == 0)
    return [first, *factors(n // first, order - 1)]


def fourier(rows: int, columns: int, n: int, like: Tensor, sign: int = -1) -> Tensor:
    """Return exp(sign 2 pi i r c / n) for all r and c, exact to the precision of the complex type of `like`."""
    # Products of whole numbers modulo n keep large angles exact.
    turns = torch.outer(torch.arange(rows, device=like.device), torch.arange(columns, device=like.device)) % n
    angle = turns.to(torch.float64) * (sign * 2 * math.pi / n)
    return torch.polar(torch.ones_like(angle), angle).to(like.dtype)


def transform(z: Tensor, ns: list[int]) -> Tensor:
    """Return the spectrum of complex signals along the last axis, in the order of the factors `ns`."""
    if len(ns) == 1:
        return z @ fourier(ns[0], ns[0], ns[0], z)
    n, n1 = math.prod(ns), ns[0]
    z = fourier(n1, n1, n1, z) @ z.unflatten(-1, (n1, n // n1))
    return transform(z * fourier(n1, n // n1, n, z), ns[1:]).flatten(-2)


def inverse(f: Tensor, ns: list[int]) -> Tensor:
    """Return the signals whose spectrum `transform` gives as `f`."""
    if len(ns) == 1:
        return f @ fourier(ns[0], ns[0], ns[0], f, 1) / ns[0]
    n, n1 = math.prod(ns), ns[0]
    z = inverse(f.unflatten(-1, (n1, n // n1)), ns[1:]) * fourier(n1, n // n1, n, f, 1)
    return (fourier(n1, n1, n1, f, 1) @ z / n1).flatten(-2)


def spectrum(x: Tensor, sizes: list[int]) -> Tensor:
    """Return spectra of real signals (N, C, L), zero beyond their end, two of them in every complex one."""
    half = (x.shape[0] + 1) // 2
    x = F.pad(x, (0, sizes[0] - x.shape[2], 0, 0, 0, 2 * half - x.shape[0]))
    return transform(torch.complex(x[:half], x[half:]), factors(sizes[0]))


def values(f: Tensor, sizes: list[int], shape: tuple[int, ...]) -> Tensor:
    """Return the first real values of signals: those of all real parts, then those of all imaginary parts."""
    z = inverse(f, factors(sizes[0]))[..., : shape[0]]
    return torch.cat([z.real, z.imag])
