"""Compiled loops for CPUs: each element takes the formula of its region alone."""

from typing import Any

import torch
from torch import Tensor

from omniconv.ops._numba import spread, unsupported
from omniconv.ops.dispatch import needs_grad, transformed

# So many elements are worth a thread.
_LEAST = 4096


def _fill(v: Tensor, x: Tensor, second: bool, parts: int) -> Tensor:
    from omniconv.ops.log_bessel._kernels import log_bessel

    out = torch.empty((parts, x.numel()), dtype=torch.float64)
    flat = [t.double().reshape(-1).contiguous() for t in (v, x)]
    spread(log_bessel, x.numel(), *flat, out, second, least=_LEAST)
    return out.view(parts, *x.shape).to(x.dtype)


@torch.library.custom_op("omniconv::log_bessel", mutates_args=(), device_types="cpu")
def _value(v: Tensor, x: Tensor, second: bool) -> Tensor:
    return _fill(v, x, second, 1)[0]


@torch.library.custom_op("omniconv::log_bessel_gradient", mutates_args=(), device_types="cpu")
def _gradient(v: Tensor, x: Tensor, second: bool) -> Tensor:
    """Return the derivatives by v and by x, one after the other."""
    return _fill(v, x, second, 2)


@_value.register_fake
def _(v, x, second):
    return x.new_empty(x.shape)


@_gradient.register_fake
def _(v, x, second):
    return x.new_empty((2, *x.shape))


def _save(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.second = inputs[2]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    by_v, by_x = _gradient(*ctx.saved_tensors, ctx.second)
    return grad * by_v, grad * by_x, None


_value.register_autograd(_backward, setup_context=_save)


def run(v: Tensor, x: Tensor, second: bool) -> Tensor:
    """Compute with the compiled loops."""
    return _value(v, x, second)


def supports(v: Tensor, x: Tensor, second: bool) -> str | None:
    """Return None, or why the call cannot be computed here."""
    reason = unsupported(v, x)
    if reason is None and transformed():
        reason = "it knows no torch.func transform and no forward-mode gradient"
    return reason


def estimate(v: Tensor, x: Tensor, second: bool) -> float:
    """Return about how many seconds the call takes."""
    gradient = 4 if needs_grad(v, x) else 1
    return gradient * (4e-5 + 2.5e-8 * x.numel())
