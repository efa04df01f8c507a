"""Compiled forward substitution for CPUs, one thread a sample."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from omniconv.ops._numba import spread, unsupported
from omniconv.ops.dispatch import needs_grad, transformed
from omniconv.ops.inverse_conv import _torch
from omniconv.ops.memory_format import memory_format


@torch.library.custom_op("omniconv::inverse_conv", mutates_args=(), device_types="cpu")
def _solve(y: Tensor, weight: Tensor) -> Tensor:
    from omniconv.ops.inverse_conv._kernels import substitute

    kh, kw = weight.shape[2:]
    inverse, taps = _torch.folded(weight)
    x = F.pad(y.permute(0, 2, 3, 1) @ inverse.T, (0, 0, kw - 1, 0, kh - 1, 0))
    spread(substitute, len(x), x, taps.permute(2, 0, 3, 1).flatten(2).contiguous())
    x = x[:, kh - 1 :, kw - 1 :].permute(0, 3, 1, 2)
    return x.contiguous(memory_format=memory_format(y))


@_solve.register_fake
def _(y, weight):
    return torch.empty_like(y, memory_format=memory_format(y))


def _save(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(output, inputs[1])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = ctx.saved_tensors
    return _torch.gradients(_solve, x, weight, grad)


_solve.register_autograd(_backward, setup_context=_save)


def run(y: Tensor, weight: Tensor) -> Tensor:
    """Compute with the compiled loops."""
    return _solve(y, weight)


def supports(y: Tensor, weight: Tensor) -> str | None:
    """Return None, or why the call cannot be computed here."""
    reason = unsupported(y, weight)
    if reason is None and transformed():
        reason = "it knows no torch.func transform and no forward-mode gradient"
    return reason


def estimate(y: Tensor, weight: Tensor) -> float:
    """Return about how many seconds the call takes."""
    gradient = 3 if needs_grad(y, weight) else 1
    return gradient * (2e-4 + y.numel() * weight[0].numel() / 5e9)
