"""Kernels that Triton compiles for CUDA: all channels of a group share the work of finding a sample, as in DCNv4.

The backward pass is one kernel, too: it reduces over the channels of a group for the gradients of offset and mask, and
adds that of x, to which many samples contribute, with atomic operations. On a GPU the order of that sum, and so
the last bits of the gradient of x, change from run to run. Second derivatives are those of the plain composition.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from omniconv.ops._triton import unsupported
from omniconv.ops.deform._torch import as_maps, empty_output, make_differentiable, pixel_major
from omniconv.ops.dispatch import needs_grad, transformed

_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@torch.library.custom_op("omniconv::deform_aggregate_triton", mutates_args=())
def _aggregate(
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    scale: float,
    keep_taps: bool,
) -> Tensor:
    from omniconv.ops.deform._triton_kernels import forward

    y = empty_output(x, offset, keep_taps)
    with torch.cuda.device_of(x):
        forward(x, offset, mask, y, kernel, stride, padding, dilation, scale)
    return y


@torch.library.custom_op("omniconv::deform_aggregate_triton_backward", mutates_args=())
def _gradients(
    grad: Tensor,
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    scale: float,
    keep_taps: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from omniconv.ops.deform._triton_kernels import backward

    # Many small terms: half precision would lose them.
    of_x = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    of_offset = torch.empty_like(offset)
    of_mask = offset.new_empty(0) if mask is None else torch.empty_like(mask)
    with torch.cuda.device_of(x):
        backward(
            grad.contiguous(), x, offset, mask, of_x, of_offset, of_mask, kernel, stride, padding, dilation, scale
        )  # fmt: skip
    return of_x.to(x.dtype), of_offset, of_mask


make_differentiable(_aggregate, _gradients)


def run(
    x: Tensor, offset: Tensor, mask: Tensor | None, kernel, stride, padding, dilation, scale, keep_taps
) -> Tensor:
    """Compute with the kernels."""
    tensors = pixel_major(x, offset, mask, math.prod(kernel))
    tensors = (None if t is None else t.contiguous() for t in tensors)
    return as_maps(_aggregate(*tensors, kernel, stride, padding, dilation, scale, keep_taps), keep_taps)


def supports(
    x: Tensor, offset: Tensor, mask: Tensor | None, kernel, stride, padding, dilation, scale, keep_taps
) -> str | None:
    """Return None, or why the call cannot be computed here."""
    tensors = (x, offset) if mask is None else (x, offset, mask)
    reason = unsupported(*tensors)
    if reason is not None:
        return reason
    if transformed():
        return "it knows no torch.func transform and no forward-mode gradient"
    for tensor in tensors:
        if tensor.dtype not in _TYPES:
            return f"it is for float16, bfloat16, float32 and float64, not {tensor.dtype}"
    if needs_grad(x) and _deterministic():
        return "the gradient of x is added up in no fixed order, and deterministic algorithms are asked for"
    return None


def _deterministic() -> bool:
    """Return whether torch refuses sums without an order; programs that are being compiled cannot ask if it warns."""
    if not torch.are_deterministic_algorithms_enabled():
        return False
    return torch.compiler.is_compiling() or not torch.is_deterministic_algorithms_warn_only_enabled()


def estimate(
    x: Tensor, offset: Tensor, mask: Tensor | None, kernel, stride, padding, dilation, scale, keep_taps
) -> float:
    """Return infinity: nothing was measured on a GPU, so `auto` waits for `omniconv.tune`."""
    return math.inf
