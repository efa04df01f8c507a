"""Plain torch: takes every call."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from omniconv.ops.dispatch import needs_grad
from omniconv.ops.memory_format import memory_format

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def run(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation) -> Tensor:
    """Compute with torch's own convolution."""
    return _CONV[weight.ndim - 2](x, weight, bias, stride, padding, dilation, groups=x.shape[1])


def supports(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation) -> str | None:
    """Return None: every call is supported."""
    return None


def estimate(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation) -> float:
    """Return about how many seconds the call takes on a CPU, with its gradients where they are wanted.

    The rates are those of torch 2.13 with oneDNN on two AVX-512 cores: from 15 taps along an axis on, oneDNN has no
    fast kernel for channels-first maps, nor for any gradient; for gradients of one and three axes it never has.
    """
    outputs = x.shape[0] * weight.shape[0] * math.prod(x.shape[2:]) // math.prod(stride)
    taps = outputs * math.prod(weight.shape[2:])
    small = max(weight.shape[2:]) < 15
    last = memory_format(x) == torch.channels_last
    # In channels-last, 13 taps run at a third of the rate of their neighbours.
    seconds = 6e-5 + taps / (
        3e10 if last and 13 in weight.shape[2:] else 8e10 if small else 1.1e11 if last else 3.3e9
    )
    if needs_grad(x, weight):
        seconds += 1.8e-4 + _gradients(x, weight, outputs, stride, dilation, small and last)
        # Several kernels a channel take torch a way that is slow for every output.
        seconds += 6.5e-9 * outputs if weight.shape[0] > x.shape[1] else 0
    return seconds


def _gradients(x: Tensor, weight: Tensor, outputs: int, stride, dilation, fast: bool) -> float:
    """Return about how many seconds the multiplications of both gradients take."""
    taps, half = outputs * math.prod(weight.shape[2:]), x.dtype in (torch.bfloat16, torch.float16)
    tiny = max(weight.shape[2:]) <= 3
    if x.ndim == 3:
        return outputs * (3e-9 if half and tiny and max(dilation) == 1 else 8e-9) + taps / 1e9
    if x.ndim == 5:
        return outputs * 2e-9 + taps / 7e8
    if max(dilation) > 1:
        return taps / (6e8 if half else 1.4e9)
    if max(stride) > 1:
        return taps / (3.5e8 if half else 2.5e9)
    if fast:
        return taps / (5.5e9 if not half else 8e9 if tiny or weight.shape[-1] == 1 else 2.5e9)
    return taps / 2.4e9
