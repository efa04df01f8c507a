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

    The rates are those of torch 2.13 with oneDNN on two AVX-512 cores, for odd square kernels at stride 1:
    from 15 taps a side on, oneDNN has no fast kernel for channels-first maps, nor for any gradient.
    """
    taps = x.numel() * math.prod(weight.shape[2:]) // math.prod(stride)
    small = max(weight.shape[2:]) < 15
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    seconds = 6e-5 + taps / (8e10 if small or last else 3.3e9)
    if needs_grad(x, weight):
        seconds += 1.8e-4 + taps / (5.5e9 if small and last else 2.4e9)
    return seconds
