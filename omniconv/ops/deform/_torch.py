"""Plain torch: every sample is gathered from its four pixels. Takes every call, differentiable any number of times."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def run(
    x: Tensor, offset: Tensor, mask: Tensor | None, kernel, stride, padding, dilation, scale, keep_taps
) -> Tensor:
    """Gather the samples and add them up."""
    tensors = pixel_major(x, offset, mask, math.prod(kernel))
    return as_maps(aggregate(*tensors, kernel, stride, padding, dilation, scale, keep_taps), keep_taps)


def pixel_major(
    x: Tensor, offset: Tensor, mask: Tensor | None, taps: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return x (N, H, W, C), offset (N, H', W', G, K, 2) and mask (N, H', W', G, K)."""
    offset = offset.permute(0, 2, 3, 1).unflatten(-1, (-1, taps, 2))
    mask = None if mask is None else mask.permute(0, 2, 3, 1).unflatten(-1, (-1, taps))
    return x.permute(0, 2, 3, 1), offset, mask


def empty_output(x: Tensor, offset: Tensor, keep_taps: bool) -> Tensor:
    """Return a new (N, H', W', K or 1, C) for pixel-major tensors."""
    n, h, w, _, taps, _ = offset.shape
    return x.new_empty(n, h, w, taps if keep_taps else 1, x.shape[3])


def as_maps(y: Tensor, keep_taps: bool) -> Tensor:
    """Return (N, H', W', K or 1, C) with the channels before the axes, and without the taps if they are summed."""
    return y.permute(0, 3, 4, 1, 2) if keep_taps else y.squeeze(3).permute(0, 3, 1, 2)


def aggregate(
    x: Tensor, offset: Tensor, mask: Tensor | None, kernel, stride, padding, dilation, scale, keep_taps
) -> Tensor:
    """Return (N, H', W', K or 1, C)."""
    n, h, w, channels = x.shape
    _, out_h, out_w, groups, taps, _ = offset.shape
    # Half precision cannot tell neighbouring positions of a large map apart.
    exact = torch.promote_types(offset.dtype, torch.float32)
    origin, tap = grid((out_h, out_w), kernel, stride, padding, dilation, scale, exact, x.device)
    rows, columns = (
        _Axis(origin[axis].view(shape) + tap[:, axis] + scale * offset[..., axis].to(exact), size)
        for axis, shape, size in ((0, (-1, 1, 1, 1), h), (1, (-1, 1, 1), w))
    )
    batch = torch.arange(n, device=x.device).view(-1, 1, 1, 1, 1)
    group = torch.arange(groups, device=x.device).view(-1, 1)
    pixels = x.reshape(n * h * w * groups, channels // groups)
    total = torch.zeros((), dtype=exact, device=x.device)
    for (y, share_y), (z, share_z) in itertools.product(rows.ends, columns.ends):
        index = ((batch * h + y) * w + z) * groups + group
        values = pixels.index_select(0, index.flatten()).view(
            n, out_h, out_w, groups, taps, channels // groups
        )
        total = total + (share_y * share_z)[..., None] * values
    if mask is not None:
        total = total * mask[..., None]
    if not keep_taps:
        return total.sum(4).to(x.dtype).view(n, out_h, out_w, 1, channels)
    return total.transpose(3, 4).to(x.dtype).reshape(n, out_h, out_w, taps, channels)


class _Axis:
    """The two pixels between which positions lie along one axis, and the share that each has in the sample."""

    def __init__(self, position: Tensor, size: int) -> None:
        inside = (position > -1) & (position < size)
        low = torch.where(inside, position, -1).detach().floor()
        share = position - low
        self.ends = [
            (index.long().clamp(0, size - 1), torch.where(inside & (index >= 0) & (index < size), part, 0))
            for index, part in ((low, 1 - share), (low + 1, share))
        ]


def grid(
    size: Sequence[int], kernel, stride, padding, dilation, scale: float, dtype: torch.dtype, device
) -> tuple[list[Tensor], Tensor]:
    """Return the centres of the kernel along both axes, and the taps (K, 2) about a centre, scaled."""
    middle = [d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True)]
    origin = [
        s * torch.arange(out, dtype=dtype, device=device) + (m - p)
        for out, s, m, p in zip(size, stride, middle, padding, strict=True)
    ]
    axes = [
        d * torch.arange(k, dtype=dtype, device=device) - m
        for d, k, m in zip(dilation, kernel, middle, strict=True)
    ]
    return origin, scale * torch.cartesian_prod(*axes)


def make_differentiable(operator: Any, gradients: Any) -> None:
    """Register what torch must know about an operator on contiguous pixel-major tensors and that of its gradients.

    First derivatives are those that `gradients` computes, second ones those of the plain composition.
    """

    @operator.register_fake
    def _(x, offset, mask, kernel, stride, padding, dilation, scale, keep_taps):
        return empty_output(x, offset, keep_taps)

    @gradients.register_fake
    def _(grad, x, offset, mask, *sizes):
        of_mask = offset.new_empty(0) if mask is None else torch.empty_like(mask)
        return torch.empty_like(x), torch.empty_like(offset), of_mask

    def save(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.sizes = inputs[3:]

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors, wanted = ctx.saved_tensors, ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            # Second derivatives are asked for.
            leaves = [t for t, needed in zip(tensors, wanted, strict=True) if needed]
            found = iter(
                torch.autograd.grad(aggregate(*tensors, *ctx.sizes), leaves, grad, create_graph=True)
            )
            computed = [next(found) if needed else None for needed in wanted]
        else:
            computed = gradients(grad, *tensors, *ctx.sizes)
        of_inputs = (t if needed else None for t, needed in zip(computed, wanted, strict=True))
        return *of_inputs, *(None for _ in ctx.sizes)

    operator.register_autograd(backward, setup_context=save)


def supports(
    x: Tensor, offset: Tensor, mask: Tensor | None, kernel, stride, padding, dilation, scale, keep_taps
):
    """Return None: every call is supported."""
    return None


def estimate(
    x: Tensor, offset: Tensor, mask: Tensor | None, kernel, stride, padding, dilation, scale, keep_taps
) -> float:
    """Return about how many seconds the call takes on a CPU."""
    samples, depth = sampled(x, offset, kernel)
    return 3e-4 + samples * (6e-8 + 8e-9 * depth)


def sampled(x: Tensor, offset: Tensor, kernel) -> tuple[int, int]:
    """Return how many positions are sampled, and how many channels at each."""
    return offset.numel() // 2, x.shape[1] * 2 * math.prod(kernel) // offset.shape[1]
