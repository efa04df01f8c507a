"""The Fourier transforms of torch: the convolution theorem as it stands, takes every call.

Of several axes the last one is transformed first and back last, so that the zeros beyond the maps are never
transformed along the others.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F


@cache
def fast_length(n: int) -> int:
    """Return the least multiple of 4 from `n` on whose other factors are 2, 3 and 5: FFT libraries like these."""
    n += -n % 4
    rest = n
    for prime in (2, 3, 5):
        while rest % prime == 0:
            rest //= prime
    return n if rest == 1 else fast_length(n + 4)


def lengths(x: Tensor, kernel: Tensor, origin: tuple[int, ...]) -> list[int]:
    """Return how long the circular convolution must be along every axis for nothing to wrap into the output."""
    found = []
    for size, taps, o in zip(x.shape[2:], kernel.shape[1:], origin, strict=True):
        n = torch.sym_max(size + torch.sym_max(o, taps - 1 - o), taps)
        # A compiled program is for any size: there is no search, but even a prime becomes a multiple of 16.
        found.append(n + -n % 16 if torch.compiler.is_compiling() else fast_length(n))
    return found


def spectrum(x: Tensor, sizes: list[int]) -> Tensor:
    """Return the half spectrum of real maps, zero beyond their end up to `sizes`."""
    f = torch.fft.rfft(x, sizes[-1])
    for axis in range(-2, -len(sizes) - 1, -1):
        f = torch.fft.fft(f, sizes[axis], axis)
    return f


def values(f: Tensor, sizes: list[int], shape: tuple[int, ...]) -> Tensor:
    """Return the first `shape` real values of the maps with half spectrum `f`."""
    for axis in range(-len(sizes), -1):
        f = torch.fft.ifft(f, sizes[axis], axis).narrow(axis, 0, shape[axis])
    return torch.fft.irfft(f, sizes[-1]).narrow(-1, 0, shape[-1])


def place(kernel: Tensor, sizes: list[int], origin: tuple[int, ...]) -> Tensor:
    """Return kernels with the tap of lag zero first and those of negative lags at the end of a circle."""
    if not any(origin):
        return kernel
    taps = kernel.shape[1:]
    sides = [side for n, k in zip(reversed(sizes), reversed(taps), strict=True) for side in (0, n - k)]
    return torch.roll(F.pad(kernel, sides), [-o for o in origin], list(range(1, kernel.ndim)))


def convolve(x: Tensor, kernel: Tensor, origin: tuple[int, ...]) -> Tensor:
    """Multiply the spectra of all maps and kernels, in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    sizes = lengths(x, kernel, origin)
    product = spectrum(x.to(wide), sizes) * spectrum(place(kernel.to(wide), sizes, origin), sizes)
    return values(product, sizes, tuple(x.shape[2:])).to(x.dtype)


def supports(*call: object) -> str | None:
    """Return None: every call is supported."""
    return None
