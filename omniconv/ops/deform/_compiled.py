"""Compiled loops over channels, for CPUs; second derivatives are those of the plain composition."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from omniconv.ops import _numba
from omniconv.ops.deform._torch import (
    as_maps,
    empty_output,
    grid,
    make_differentiable,
    pixel_major,
    sampled,
)
from omniconv.ops.dispatch import needs_grad, transformed

# Fewer samples are not worth a second thread.
_LEAST = 4096


@torch.library.custom_op("omniconv::deform_aggregate", mutates_args=(), device_types="cpu")
def _aggregate(
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    scale: float,
    keep_taps: bool,
) -> Tensor:
    from omniconv.ops.deform._kernels import forward

    y = empty_output(x, offset, keep_taps).zero_()
    table = _table(x, offset, kernel, stride, padding, dilation, scale, keep_taps)
    rows = offset.shape[0] * offset.shape[1]
    least = _LEAST * rows // max(1, mask.numel())
    _numba.spread(forward, rows, *_rows(x, offset, mask, y), *table, least=least)
    return y


@torch.library.custom_op("omniconv::deform_aggregate_backward", mutates_args=(), device_types="cpu")
def _gradients(
    grad: Tensor,
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    scale: float,
    keep_taps: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from omniconv.ops.deform._kernels import backward

    grad = grad.contiguous()
    found = torch.zeros_like(x), torch.empty_like(offset), torch.empty_like(mask)
    table = _table(x, offset, kernel, stride, padding, dilation, scale, keep_taps)
    groups = x.shape[0] * offset.shape[3]
    least = _LEAST * groups // max(1, mask.numel())
    arrays = *_rows(x, offset, mask, grad), *_rows(*found)
    _numba.spread(backward, groups, *arrays, *table, least=least)
    return found


def _rows(x: Tensor, offset: Tensor, mask: Tensor, *others: Tensor) -> list[Tensor]:
    """Return the arrays as the kernels take them."""
    channels = x.shape[-1] // offset.shape[3]
    maps = [t.view(t.numel() // channels, channels) for t in (x, *others)]
    return [maps[0], offset.flatten(0, 3), mask.flatten(0, 3), *maps[1:]]


def _table(x: Tensor, offset: Tensor, kernel, stride, padding, dilation, scale: float, keep_taps: bool):
    """Return the kernels' last arguments."""
    origin, taps = grid(offset.shape[1:3], kernel, stride, padding, dilation, scale, x.dtype, x.device)
    return *origin, taps, taps.new_tensor(scale).numpy()[()], (*x.shape[1:3], offset.shape[3], int(keep_taps))


make_differentiable(_aggregate, _gradients)


def run(
    x: Tensor, offset: Tensor, mask: Tensor | None, kernel, stride, padding, dilation, scale, keep_taps
) -> Tensor:
    """Compute with the compiled loops."""
    x, offset, mask = pixel_major(x, offset, mask, math.prod(kernel))
    mask = offset.new_ones(offset.shape[:5]) if mask is None else mask
    tensors = (t.contiguous() for t in (x, offset, mask))
    return as_maps(_aggregate(*tensors, kernel, stride, padding, dilation, scale, keep_taps), keep_taps)


def supports(
    x: Tensor, offset: Tensor, mask: Tensor | None, kernel, stride, padding, dilation, scale, keep_taps
) -> str | None:
    """Return None, or why the call cannot be computed here."""
    tensors = (x, offset) if mask is None else (x, offset, mask)
    types = {t.dtype for t in tensors}
    if len(types) > 1:
        return f"x, offset and mask must be of one type, not {', '.join(sorted(map(str, types)))}"
    if transformed():
        return "it knows no torch.func transform and no forward-mode gradient"
    return _numba.unsupported(*tensors)


def estimate(
    x: Tensor, offset: Tensor, mask: Tensor | None, kernel, stride, padding, dilation, scale, keep_taps
) -> float:
    """Return about how many seconds the call takes, with its gradients where they are wanted."""
    samples, depth = sampled(x, offset, kernel)
    once = 2e-4 + samples * (2e-8 + 4e-10 * depth)
    return 3 * once if needs_grad(x, offset, mask) else once
