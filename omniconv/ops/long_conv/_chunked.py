"""The convolution theorem in chunks of channels and samples that stay in the cache, with exact gradients.

What is saved for the gradients are maps and kernels alone; their spectra are computed again. The convolution is
bilinear, so everything that differentiating it again and again asks for are these two operators themselves.
The transforms are those of torch, or products with the factors of the Fourier matrix (`monarch`).
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from omniconv.ops.dispatch import transformed
from omniconv.ops.long_conv import _torch, monarch

WORKSPACE = {"cpu": 2**22}
"""Bytes of a chunk's workspace: what stays in a core's caches; on other devices, what keeps them busy."""


def _chunks(x: Tensor, sizes: list[int]) -> Iterator[tuple[slice, Iterator[slice]]]:
    """Yield slices of channels, each with the slices of samples that go with it."""
    n, c = x.shape[:2]
    bytes_a_map = 4 * math.prod(sizes) * (8 if x.dtype == torch.float64 else 4)
    maps = max(1, WORKSPACE.get(x.device.type, 2**28) // bytes_a_map)
    # A real transform alone takes four times as long as one of two.
    channels = min(c, max(2, maps // n))
    samples = max(1, maps // channels)
    for first in range(0, c, channels):
        yield slice(first, first + channels), (slice(i, i + samples) for i in range(0, n, samples))


@torch.library.custom_op("omniconv::long_conv", mutates_args=())
def _convolve(x: Tensor, kernel: Tensor, origin: Sequence[int], matrices: bool) -> Tensor:
    form = monarch if matrices else _torch
    wide = torch.promote_types(x.dtype, torch.float32)
    shape, place = tuple(x.shape[2:]), tuple(origin)
    sizes = _torch.lengths(x, kernel, place)
    y = torch.empty_like(x)
    for channels, batches in _chunks(x, sizes):
        k = form.spectrum(_torch.place(kernel[channels].to(wide), sizes, place)[None], sizes)
        for samples in batches:
            f = form.spectrum(x[samples, channels].to(wide), sizes)
            y[samples, channels] = form.values(f.mul_(k), sizes, shape)[: y[samples].shape[0]]
    return y


@torch.library.custom_op("omniconv::long_conv_backward", mutates_args=())
def _gradients(
    grad: Tensor,
    x: Tensor,
    kernel: Tensor,
    origin: Sequence[int],
    matrices: bool,
    of_x: bool,
    of_kernel: bool,
) -> tuple[Tensor, Tensor]:
    form = monarch if matrices else _torch
    wide = torch.promote_types(x.dtype, torch.float32)
    shape, place = tuple(x.shape[2:]), tuple(origin)
    taps = tuple(kernel.shape[1:])
    sizes = _torch.lengths(x, kernel, place)
    grad_x = torch.empty_like(x) if of_x else x.new_empty(0)
    grad_kernel = torch.empty_like(kernel) if of_kernel else kernel.new_empty(0)
    for channels, batches in _chunks(x, sizes):
        k = form.spectrum(_torch.place(kernel[channels].to(wide), sizes, place)[None], sizes).conj_physical()
        total = torch.zeros_like(k)
        for samples in batches:
            g = form.spectrum(grad[samples, channels].to(wide), sizes)
            if of_kernel:
                f = form.spectrum(x[samples, channels].to(wide), sizes)
                total += (f.conj_physical_().mul_(g)).sum(0, keepdim=True)
            if of_x:
                grad_x[samples, channels] = form.values(g.mul_(k), sizes, shape)[: grad_x[samples].shape[0]]
        if of_kernel:
            lags = form.values(total, sizes, tuple(sizes))[0]
            lags = torch.roll(lags, place, list(range(1, lags.ndim))) if any(place) else lags
            grad_kernel[channels] = lags[:, *(slice(t) for t in taps)]
    return grad_x, grad_kernel


@_convolve.register_fake
def _(x, kernel, origin, matrices):
    return torch.empty_like(x)


@_gradients.register_fake
def _(grad, x, kernel, origin, matrices, of_x, of_kernel):
    return (
        torch.empty_like(x) if of_x else x.new_empty(0),
        torch.empty_like(kernel) if of_kernel else kernel.new_empty(0),
    )


def _save(ctx, inputs, output) -> None:
    x, kernel, ctx.origin, ctx.matrices = inputs
    ctx.save_for_backward(x, kernel)


def _backward(ctx, grad):
    x, kernel = ctx.saved_tensors
    of_x, of_kernel = ctx.needs_input_grad[:2]
    grad_x, grad_kernel = _gradients(grad, x, kernel, ctx.origin, ctx.matrices, of_x, of_kernel)
    return grad_x if of_x else None, grad_kernel if of_kernel else None, None, None


def _save_twice(ctx, inputs, output) -> None:
    grad, x, kernel, ctx.origin, ctx.matrices, ctx.of_x, ctx.of_kernel = inputs
    ctx.save_for_backward(grad, x, kernel)


def _backward_twice(ctx, to_x, to_kernel):
    # With B(x, k) the convolution and G(g; x, k) its two gradients, <to, G(g; x, k)> is <g, B(to_x, k) + B(x, to_k)>.
    grad, x, kernel = ctx.saved_tensors
    how = ctx.origin, ctx.matrices
    to_x = to_x if ctx.of_x else torch.zeros_like(x)
    to_kernel = to_kernel if ctx.of_kernel else torch.zeros_like(kernel)
    of_grad = _convolve(to_x, kernel, *how) + _convolve(x, to_kernel, *how)
    of_x, of_kernel = _gradients(grad, to_x, to_kernel, *how, True, True)
    return of_grad, of_x, of_kernel, None, None, None, None


_convolve.register_autograd(_backward, setup_context=_save)
_gradients.register_autograd(_backward_twice, setup_context=_save_twice)


def convolve(x: Tensor, kernel: Tensor, origin: tuple[int, ...]) -> Tensor:
    """Multiply spectra chunk by chunk."""
    return _convolve(x, kernel, origin, False)


def by_matrices(x: Tensor, kernel: Tensor, origin: tuple[int, ...]) -> Tensor:
    """The same with transforms by matrix products."""
    return _convolve(x, kernel, origin, True)


def supports(x: Tensor, *rest: object) -> str | None:
    """Return None, or why the call cannot be computed here."""
    if transformed():
        return "it knows no torch.func transform and no forward-mode gradient"
    return None


def supports_matrices(x: Tensor, *rest: object) -> str | None:
    """Return None, or why the call cannot be computed by matrix products."""
    if x.ndim != 3:
        return f"it is for one axis, not {x.ndim - 2}"
    return supports(x)
