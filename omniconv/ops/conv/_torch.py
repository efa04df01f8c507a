"""Plain torch, which takes every call, and what the other implementations share."""

import math

from torch import Tensor
from torch.nn import functional as F

_CONV = {1: F.conv1d, 2: F.conv2d}


def run(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation, groups) -> Tensor:
    """Compute with torch's own convolution."""
    return _CONV[weight.ndim - 2](x, weight, bias, stride, padding, dilation, groups)


def supports(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation, groups) -> str | None:
    """Return None: every call is supported."""
    return None


def estimate(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation, groups) -> float:
    """Return about how many seconds the call takes on a core of a CPU with torch 2.13 and oneDNN.

    Its vectors run over output channels, so that few of them leave most of a vector empty; channels-first maps in
    groups have no fast kernel from 15 taps along an axis on.
    """
    rate = 4.8e10 * min(1, weight.shape[0] / 16)
    if groups > 1 and max(weight.shape[2:]) >= 15 and x.is_contiguous():
        rate = min(rate, 3.3e9)
    return 1e-5 + products(x, weight, stride, padding, dilation) / rate


def output_size(x: Tensor, weight: Tensor, stride, padding, dilation) -> list[int]:
    """Return the sizes of the output's axes."""
    return [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    ]


def products(x: Tensor, weight: Tensor, stride, padding, dilation) -> int:
    """Return how many multiplications a call takes."""
    return x.shape[0] * weight.numel() * math.prod(output_size(x, weight, stride, padding, dilation))
