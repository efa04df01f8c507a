"""Every gradient as the right forward convolution, in channels-last: what oneDNN runs well on a CPU.

Where torch computes the gradients of a depthwise convolution on a CPU, it takes tens of times as long as its
channels-last forward pass. Both gradients are forward convolutions too: that of the input has the flipped
kernel, and that of the weight convolves every (sample, channel) plane of the input with the gradient of the
same plane, which is a depthwise convolution over N C channels.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from omniconv.ops.depthwise_conv._torch import needs_grad, transformed

_LAST = torch.channels_last
_ONEDNN = torch.backends.mkldnn.is_available()


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    x = x.contiguous(memory_format=_LAST)
    return F.conv2d(x, weight, bias, padding=padding, groups=weight.shape[0])


def _fold(x: Tensor) -> Tensor:
    # (N, C, H, W) -> (1, N C, H, W), channels-last: the planes lie side by side at every pixel. Without
    # `contiguous`, reshape returns a view of a tensor that is not channels-last, on which oneDNN is slow.
    n, c, h, w = x.shape
    return x.permute(2, 3, 0, 1).reshape(1, h, w, n * c).contiguous().permute(0, 3, 1, 2)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return _convolve(x, weight)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        x, weight = ctx.saved_tensors
        grad = grads[0]
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = _convolve(grad, weight.flip(2, 3))
        if ctx.needs_input_grad[1]:
            n, c = x.shape[:2]
            kernel = weight.shape[2:]
            padding = (kernel[0] // 2, kernel[1] // 2)
            planes = F.conv2d(_fold(x), _fold(grad).transpose(0, 1), padding=padding, groups=n * c)
            grad_weight = planes.reshape(n, c, *kernel).sum(0).unsqueeze(1)
        return grad_x, grad_weight


def run(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation) -> Tensor:
    """Compute in channels-last and return the input's memory format."""
    kept = x.is_contiguous(memory_format=_LAST)
    if needs_grad(x, weight):
        y = _Depthwise.apply(x, weight)
        y = y if bias is None else y + bias[:, None, None]
    else:
        y = _convolve(x, weight, bias)
    return y if kept else y.contiguous()


def supports(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation) -> str | None:
    """Return None, or why the call cannot be computed here."""
    kernel = tuple(weight.shape[2:])
    if len(kernel) != 2:
        return f"it is for 2-d kernels, not {len(kernel)}-d"
    if any(k % 2 == 0 for k in kernel):
        return f"it is for odd kernels, not {kernel[0]} x {kernel[1]}"
    if weight.shape[0] != x.shape[1]:
        return f"it is for one kernel a channel, not {weight.shape[0] // x.shape[1]}"
    if any(s != 1 for s in stride) or any(d != 1 for d in dilation):
        return f"it is for stride 1 and dilation 1, not {stride} and {dilation}"
    if any(p != k // 2 for p, k in zip(padding, kernel, strict=True)):
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

    What grows with the maps are the copies between memory formats and of the folded planes. Infinite where
    oneDNN's channels-last convolution was not measured to be the faster one: float64 and oblong kernels.
    """
    height, width = weight.shape[2:]
    if x.dtype != torch.float32 or height != width or not _ONEDNN:
        return math.inf
    taps = x.numel() * height * width
    last = x.is_contiguous(memory_format=_LAST)
    rate = 3e10 if height == 13 else 9e10
    if needs_grad(x, weight):
        return 4.2e-4 + x.numel() * (3.5e-9 if last else 7e-9) + 3 * taps / rate
    return 6e-5 + x.numel() * (0 if last else 2.5e-9) + taps / rate
