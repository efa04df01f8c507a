"""Plain torch: takes every call."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def run(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation) -> Tensor:
    """Compute with torch's own convolution."""
    return _CONV[weight.ndim - 2](x, weight, bias, stride, padding, dilation, groups=x.shape[1])


def supports(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation) -> str | None:
    """Return None: every call is supported."""
    return None


def needs_grad(*tensors: Tensor | None) -> bool:
    """Return whether gradients of any of the tensors will be asked for."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def estimate(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation) -> float:
    """Return about how many seconds the call takes on a CPU, with its gradients where they are wanted.

    The rates are those of torch 2.13 with oneDNN on two AVX-512 cores: from 15 taps along an axis on, oneDNN has no
    fast kernel for channels-first maps, nor for any gradient; for gradients of one and three axes it never has.
    """
    outputs = x.shape[0] * weight.shape[0] * math.prod(x.shape[2:]) // math.prod(stride)
    taps = outputs * math.prod(weight.shape[2:])
    small = max(weight.shape[2:]) < 15
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    seconds = 6e-5 + taps / (8e10 if small else 1.1e11 if last else 3.3e9)
    if needs_grad(x, weight):
        if x.ndim == 4:
            seconds += 1.8e-4 + taps / (5.5e9 if small and last else 2.4e9)
        else:
            seconds += (
                1.8e-4 + outputs * (8e-9 if x.ndim == 3 else 2e-9) + taps / (1e9 if x.ndim == 3 else 7e8)
            )
    return seconds
