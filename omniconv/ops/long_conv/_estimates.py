"""About how many seconds each implementation takes on a CPU: measured with torch 2.13 and MKL on an AVX-512 core.

Beside the transforms themselves stands the memory: once the spectra of all maps leave the cache, every pass over them
costs more than the transform, unless maps go through in chunks. Chunks also bound what a large call takes.
"""

import math

import torch
from torch import Tensor

from omniconv.ops.depthwise_conv.api import TABLE as DEPTHWISE
from omniconv.ops.dispatch import needs_grad
from omniconv.ops.long_conv import _depthwise, _torch

_CACHE = 2**25
"""Bytes of spectra and padded maps beyond which plain torch slows down."""


def _points(x: Tensor, kernel: Tensor, origin: tuple[int, ...]) -> int:
    return x.shape[0] * x.shape[1] * math.prod(_torch.lengths(x, kernel, origin))


def plain(x, kernel, skip, gate_in, gate_out, origin) -> float:
    """Return the seconds of `_torch.convolve`, with its gradients where they are wanted.

    Infinite in compiled programs: the compiler has no code for complex numbers, and no length that suits every size.
    """
    if torch.compiler.is_compiling():
        return math.inf
    points = _points(x, kernel, origin)
    fits = 16 * points <= _CACHE
    if needs_grad(x, kernel):
        return 1.5e-4 + points * (2e-8 if fits else 4.2e-8)
    return 5e-5 + points * (6e-9 if fits else 1.4e-8)


def chunked(x, kernel, skip, gate_in, gate_out, origin) -> float:
    """Return the seconds of `_chunked.convolve`."""
    points = _points(x, kernel, origin)
    return 4e-4 + points * 2e-8 if needs_grad(x, kernel) else 1.5e-4 + points * 6.5e-9


def depthwise(x, kernel, skip, gate_in, gate_out, origin) -> float:
    """Return the seconds of `_depthwise.convolve`: what the direct convolution says of itself.

    Infinite in compiled programs, which would be compiled anew for every size that its cost model looks at.
    """
    if torch.compiler.is_compiling():
        return math.inf
    call = DEPTHWISE.prepare(x, _depthwise.weight(x, kernel), padding=_depthwise.padding(kernel, origin))
    return DEPTHWISE.select("auto", call).estimate(*call)


def monarch(x, kernel, skip, gate_in, gate_out, origin) -> float:
    """Return the seconds of `_chunked.by_matrices`: no match for FFTs without tensor cores."""
    return 5 * chunked(x, kernel, skip, gate_in, gate_out, origin)
