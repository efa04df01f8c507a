"""What the compiled implementations share: how torch knows them, their gradients, and what they cannot take."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from omniconv.ops._numba import unsupported
from omniconv.ops.conv._torch import output_size
from omniconv.ops.dispatch import transformed
from omniconv.ops.memory_format import memory_format


def register(name: str, compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return `compute` as an operator that torch can compile, export and differentiate.

    Gradients are those of torch's own convolution, to any order.
    """
    operator = torch.library.custom_op(f"omniconv::{name}", compute, mutates_args=(), device_types="cpu")
    operator.register_fake(_fake)
    operator.register_autograd(_backward, setup_context=_save)
    return operator


def _fake(x, weight, bias, stride, padding, dilation, groups):
    shape = (x.shape[0], weight.shape[0], *output_size(x, weight, stride, padding, dilation))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def _save(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.sizes = inputs[3:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    stride, padding, dilation, groups = ctx.sizes
    found = torch.ops.aten.convolution_backward(
        grad, x, weight, [weight.shape[0]], stride, padding, dilation, False, [0, 0], groups,
        list(ctx.needs_input_grad[:3]),
    )  # fmt: skip
    return *found, None, None, None, None


def incapable(x: Tensor, weight: Tensor) -> str | None:
    """Return why no compiled implementation can take these maps and kernels, or None."""
    if reason := unsupported(x, weight):
        return reason
    if weight.dtype != x.dtype:
        return f"maps and kernels must be of one type, not {x.dtype} and {weight.dtype}"
    if transformed():
        return "it knows no torch.func transform and no forward-mode gradient"
    return None
