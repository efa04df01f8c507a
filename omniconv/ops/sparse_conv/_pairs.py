"""Gather, multiply and scatter along the pairs of every tap: no multiplication with what is not there.

The gradient with respect to x runs along the same pairs backwards; that with respect to the weight is a product of
gathered rows. Each is the other's gradient again, so derivatives of every order run on these two operators.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from omniconv.ops.dispatch import needs_grad, transformed


def _pairs(neighbours: Tensor, reverse: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the rows to read and the rows to write of every tap."""
    taps, outputs = (neighbours.T >= 0).nonzero(as_tuple=True)
    inputs = neighbours[outputs, taps]
    counts = torch.bincount(taps, minlength=neighbours.shape[1]).tolist()
    source, target = (outputs, inputs) if reverse else (inputs, outputs)
    yield from zip(source.split(counts), target.split(counts), strict=True)


@torch.library.custom_op("omniconv::sparse_conv", mutates_args=())
def _convolve(x: Tensor, weight: Tensor, neighbours: Tensor, rows: int, reverse: bool) -> Tensor:
    y = x.new_zeros(rows, weight.shape[2])
    for matrix, (source, target) in zip(weight, _pairs(neighbours, reverse), strict=True):
        y.index_add_(0, target, x.index_select(0, source) @ matrix)
    return y


@torch.library.custom_op("omniconv::sparse_conv_weight", mutates_args=())
def _correlate(x: Tensor, y: Tensor, neighbours: Tensor, reverse: bool) -> Tensor:
    weight = x.new_empty(neighbours.shape[1], x.shape[1], y.shape[1])
    for matrix, (source, target) in zip(weight, _pairs(neighbours, reverse), strict=True):
        torch.mm(x.index_select(0, source).T, y.index_select(0, target), out=matrix)
    return weight


@_convolve.register_fake
def _(x: Tensor, weight: Tensor, neighbours: Tensor, rows: int, reverse: bool) -> Tensor:
    return x.new_empty(rows, weight.shape[2])


@_correlate.register_fake
def _(x: Tensor, y: Tensor, neighbours: Tensor, reverse: bool) -> Tensor:
    return x.new_empty(neighbours.shape[1], x.shape[1], y.shape[1])


def _save_convolve(ctx, inputs, output) -> None:
    x, weight, neighbours, _, ctx.reverse = inputs
    ctx.save_for_backward(x, weight, neighbours)


def _backward_convolve(ctx, grad: Tensor):
    x, weight, neighbours = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * 5
    if ctx.needs_input_grad[0]:
        grads[0] = _convolve(grad, weight.transpose(1, 2), neighbours, x.shape[0], not ctx.reverse)
    if ctx.needs_input_grad[1]:
        grads[1] = _correlate(x, grad, neighbours, ctx.reverse)
    return tuple(grads)


def _save_correlate(ctx, inputs, output) -> None:
    x, y, neighbours, ctx.reverse = inputs
    ctx.save_for_backward(x, y, neighbours)


def _backward_correlate(ctx, grad: Tensor):
    x, y, neighbours = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * 4
    if ctx.needs_input_grad[0]:
        grads[0] = _convolve(y, grad.transpose(1, 2), neighbours, x.shape[0], not ctx.reverse)
    if ctx.needs_input_grad[1]:
        grads[1] = _convolve(x, grad, neighbours, y.shape[0], ctx.reverse)
    return tuple(grads)


_convolve.register_autograd(_backward_convolve, setup_context=_save_convolve)
_correlate.register_autograd(_backward_correlate, setup_context=_save_correlate)


def run(x: Tensor, weight: Tensor, neighbours: Tensor) -> Tensor:
    """Add up the products of every tap's pairs."""
    return _convolve(x, weight.flatten(2).permute(2, 1, 0), neighbours, neighbours.shape[0], False)


def supports(x: Tensor, weight: Tensor, neighbours: Tensor) -> str | None:
    """Return None, or why the call is not supported."""
    if x.dtype not in (torch.float32, torch.float64):
        return f"it is for float32 and float64, not {x.dtype}"
    if transformed():
        return "it takes no torch.func transform"
    return None


def estimate(x: Tensor, weight: Tensor, neighbours: Tensor) -> float:
    """Return about how many seconds the call takes on a CPU, with its gradients where they are wanted.

    How many pairs there are is not known from shapes; a third of the table is what scanned surfaces fill.
    """
    pairs = neighbours.numel() / 3
    gathered = pairs * (weight.shape[0] + weight.shape[1])
    seconds = 2e-5 * neighbours.shape[1] + neighbours.numel() * 5e-9 + gathered * 2.3e-9
    seconds += pairs * weight.shape[0] * weight.shape[1] * 1.5e-11
    return 3.3 * seconds if needs_grad(x, weight) else seconds
