"""The two sums of which depthwise convolutions and all their derivatives are made, as operators of autograd.

The convolution of a map whose pixels lie `gap` apart,

    y[n, c, o] = sum over u of  w[c, u] X[n, c, stride o + dilation u - padding],   X[gap i] = x[i], else 0,

has as its gradient with respect to x another one with stride and gap exchanged and the kernel flipped, and with
respect to w

    dw[c, u] = sum over n, o of  X[n, c, stride o + dilation u - padding] g[n, c, o],

whose own gradients are convolutions again. So whoever computes these two sums has derivatives of every order.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from omniconv.ops.memory_format import memory_format


def differentiable(
    name: str,
    run_convolve: Callable[..., Tensor],
    run_weight: Callable[..., Tensor],
    devices: str | None = None,
) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Return `convolve` and `weight_gradient`, which call each other for their gradients.

    Args:
        name: of the operators, in programs that are compiled and exported.
        run_convolve: `(x, weight, bias, size, stride, padding, dilation, gap, flip)` computes the first sum; `size` is
            (channels, *pixels) of y, and with `flip` the kernel is read from its last tap to its first.
        run_weight: `(x, g, kernel, stride, padding, dilation, gap)` computes the second one. torch reads the operators'
            signatures off the annotations of both.
        devices: those that it is for, all if None.
    """

    def save_convolve(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.sizes = inputs[4:]

    def backward_convolve(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (stride, padding, dilation, gap, flip) = ctx.saved_tensors, ctx.sizes
        kernel = weight.shape[2:]
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            mirrored = _mirrored(padding, dilation, kernel)
            of_x = convolve(grad, weight, None, x.shape[1:], gap, mirrored, dilation, stride, not flip)
        if ctx.needs_input_grad[1]:
            of_weight = weight_gradient(x, grad, kernel, stride, padding, dilation, gap)
            if flip:
                of_weight = of_weight.flip(tuple(range(2, weight.ndim)))
        if ctx.needs_input_grad[2]:
            of_bias = grad.sum((0, *range(2, grad.ndim)))
        return of_x, of_weight, of_bias, None, None, None, None, None, None

    def save_weight(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.sizes = inputs[2:]

    def backward_weight(ctx: Any, change: Tensor) -> tuple[Tensor | None, ...]:
        (x, grad), (kernel, stride, padding, dilation, gap) = ctx.saved_tensors, ctx.sizes
        of_x = of_grad = None
        if ctx.needs_input_grad[0]:
            mirrored = _mirrored(padding, dilation, kernel)
            of_x = convolve(grad, change, None, x.shape[1:], gap, mirrored, dilation, stride, True)
        if ctx.needs_input_grad[1]:
            of_grad = convolve(x, change, None, grad.shape[1:], stride, padding, dilation, gap, False)
        return of_x, of_grad, None, None, None, None, None

    def fake_convolve(x, weight, bias, size, stride, padding, dilation, gap, flip):
        return empty_map(x, (x.shape[0], *size))

    def fake_weight(x, grad, kernel, stride, padding, dilation, gap):
        return x.new_empty((max(x.shape[1], grad.shape[1]), 1, *kernel))

    convolve = _operator(
        f"depthwise_convolve_{name}", run_convolve, fake_convolve, save_convolve, backward_convolve, devices
    )
    weight_gradient = _operator(
        f"depthwise_weight_{name}", run_weight, fake_weight, save_weight, backward_weight, devices
    )
    return convolve, weight_gradient


def _mirrored(padding: Sequence[int], dilation: Sequence[int], kernel: Sequence[int]) -> list[int]:
    """Return the padding of the convolution that is the gradient of another one's input."""
    return [d * (k - 1) - p for p, d, k in zip(padding, dilation, kernel, strict=True)]


def _operator(
    name: str,
    run: Callable[..., Tensor],
    fake: Callable[..., Tensor],
    save: Callable[..., None],
    differentiate: Callable[..., Any],
    devices: str | None,
) -> Callable[..., Tensor]:
    """Return what runs, with its gradient.

    Compiled and exported programs call operators that torch knows by name; eager programs call the same functions
    without what torch's registry adds to every call, which for small maps is more than the call itself.
    """
    operator: Any = torch.library.custom_op(f"omniconv::{name}", run, mutates_args=(), device_types=devices)
    operator.register_autograd(differentiate, setup_context=save)
    operator.register_fake(fake)

    class Eager(torch.autograd.Function):
        # A separate setup_context would have torch inspect the signature at every call.
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Tensor:
            save(ctx, inputs, y := run(*inputs))
            return y

        backward: Any = staticmethod(differentiate)

    def call(x: Tensor, *others: Any) -> Tensor:
        if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter):
            return operator(x, *others)
        return Eager.apply(x, *others)

    return call


def empty_map(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Return an empty map in the type and memory format of `x`."""
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def output_size(x: Tensor, weight: Tensor, stride, padding, dilation) -> list[int]:
    """Return the pixels of the convolved map.

    Raises:
        ValueError: if the kernel does not fit into the padded map.
    """
    size = [
        (s + 2 * p - d * (k - 1) - 1) // step + 1
        for s, p, d, k, step in zip(x.shape[2:], padding, dilation, weight.shape[2:], stride, strict=True)
    ]
    if min(size) < 1:
        raise ValueError(
            f"the kernel must fit into the padded map: got kernel {tuple(weight.shape[2:])}, dilation {dilation}, "
            f"map {tuple(x.shape[2:])} and padding {padding}"
        )
    return size


def repeat_channels(x: Tensor, times: int) -> Tensor:
    """Return every channel several times, side by side, in the memory format of `x`, which its gradient keeps too."""
    if times == 1:
        return x
    if memory_format(x) == torch.contiguous_format:
        return x.repeat_interleave(times, 1)
    x = x.movedim(1, -1).unsqueeze(-1)
    return x.expand(*x.shape[:-1], times).flatten(-2).movedim(-1, 1)


def repeating_seconds(x: Tensor, times: int) -> float:
    """Return about how many seconds `repeat_channels` takes, with the sum of the copies' gradients."""
    return (5e-10 if memory_format(x) == torch.contiguous_format else 1.1e-9) * times * x.numel()
