"""Forward pass and input gradient as convolutions in channels-last: what oneDNN runs well on a CPU.

Where torch computes the gradients of a depthwise convolution on a CPU, it takes tens of times as long as its
channels-last forward pass. The gradient of the input is a forward convolution with the flipped kernel. That of the
weight is summed by the direct kernels, where numba is there for them; else it too is a forward convolution, of every
(sample, channel) plane of the input with the gradient of the same plane.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from omniconv.ops.depthwise_conv import _direct
from omniconv.ops.dispatch import needs_grad, transformed
from omniconv.ops.memory_format import memory_format

_LAST = torch.channels_last
_ONEDNN = torch.backends.mkldnn.is_available()


def _convolve(x: Tensor, weight: Tensor, padding, dilation, bias: Tensor | None = None) -> Tensor:
    x = x.contiguous(memory_format=_LAST)
    return F.conv2d(x, weight, bias, 1, padding, dilation, weight.shape[0])


def _fold(x: Tensor) -> Tensor:
    # (N, C, H, W) -> (1, N C, H, W), channels-last: the planes lie side by side at every pixel. Without
    # `contiguous`, reshape returns a view of a tensor that is not channels-last, on which oneDNN is slow.
    n, c, h, w = x.shape
    return x.permute(2, 3, 0, 1).reshape(1, h, w, n * c).contiguous().permute(0, 3, 1, 2)


def _weight_gradient(x: Tensor, grad: Tensor, kernel: torch.Size, padding, dilation) -> Tensor:
    if _direct.supports(x, grad, None, 1, padding, dilation) is None:
        return _direct.weight_gradient(x, grad, kernel, (1, 1), padding, dilation, (1, 1))
    n, c = x.shape[:2]
    # The taps lie `dilation` apart, so that is the stride from sum to sum.
    planes = F.conv2d(_fold(x), _fold(grad).transpose(0, 1), None, dilation, padding, 1, n * c)
    return planes.reshape(n, c, *kernel).sum(0).unsqueeze(1)


class _Depthwise(torch.autograd.Function):
    # A separate setup_context would have torch inspect the signature at every call.
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, padding, dilation) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sizes = padding, dilation
        return _convolve(x, weight, padding, dilation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        (x, weight), (padding, dilation) = ctx.saved_tensors, ctx.sizes
        grad = grads[0]
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            # Padding that keeps the size is the same seen from the output.
            grad_x = _convolve(grad, weight.flip(2, 3), padding, dilation)
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(x, grad, weight.shape[2:], padding, dilation)
        return grad_x, grad_weight, None, None


def run(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation) -> Tensor:
    """Compute in channels-last and return the input's memory format."""
    if needs_grad(x, weight):
        y = cast(Any, _Depthwise).apply(x, weight, padding, dilation)
        y = y if bias is None else y + bias[:, None, None]
    else:
        y = _convolve(x, weight, padding, dilation, bias)
    return y.contiguous(memory_format=memory_format(x))


def supports(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation) -> str | None:
    """Return None, or why the call cannot be computed here."""
    kernel = tuple(weight.shape[2:])
    if len(kernel) != 2:
        return f"it is for 2-d kernels, not {len(kernel)}-d"
    if any(k % 2 == 0 for k in kernel):
        return f"it is for odd kernels, not {kernel[0]} x {kernel[1]}"
    if weight.shape[0] != x.shape[1]:
        return f"it is for one kernel a channel, not {weight.shape[0] // x.shape[1]}"
    if any(s != 1 for s in stride):
        return f"it is for stride 1, not {stride}"
    if any(p != d * (k // 2) for p, k, d in zip(padding, kernel, dilation, strict=True)):
        return f"it is for padding that keeps the size, not {padding}"
    if x.device.type != "cpu":
        return f"it is for CPUs, not {x.device.type}"
    if x.dtype not in (torch.float32, torch.float64) or weight.dtype != x.dtype:
        return f"it is for float32 and float64, not {x.dtype} maps and {weight.dtype} kernels"
    if transformed():
        return "it knows no torch.func transform and no forward-mode gradient"
    return None


def estimate(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation) -> float:
    """Return about how many seconds the call takes, measured as told at the estimate of plain torch.

    With the direct kernels for the weight's gradient it takes a little less than they do for everything where kernels
    are small, but for 13 taps along an axis and wide dilation, where oneDNN is slow. Without them, what grows with
    the maps are the copies between memory formats and of the folded planes. Infinite where it was not measured to be
    the faster one.
    """
    height, width = weight.shape[2:]
    last = memory_format(x) == _LAST
    if x.dtype != torch.float32 or not _ONEDNN:
        return math.inf
    if _direct.supports(x, weight, bias, stride, padding, dilation) is None:
        slow = not last or 13 in (height, width) or max(dilation) > 6
        share = math.inf if slow else 0.88 if 3 < max(height, width) < 13 else 1.02
        return 2e-5 + share * _direct.estimate(x, weight, bias, stride, padding, dilation)
    if height != width or max(dilation) > 1:
        return math.inf
    taps = x.numel() * height * width
    rate = 3e10 if height == 13 else 9e10
    if needs_grad(x, weight):
        return 4.2e-4 + x.numel() * (3.5e-9 if last else 7e-9) + 3 * taps / rate
    return 6e-5 + x.numel() * (0 if last else 2.5e-9) + taps / rate
