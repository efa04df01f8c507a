"""Plain torch: pixels of one anti-diagonal depend on earlier ones alone, so each is one matrix product."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from omniconv.ops.dispatch import needs_grad
from omniconv.ops.memory_format import memory_format


def folded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inverse of the corner tap's triangle L, and L^-1 W of all taps (C, C, kh, kw), the corner's zero."""
    channels = weight.shape[0]
    one = torch.eye(channels, dtype=weight.dtype, device=weight.device)
    inverse = torch.linalg.solve_triangular(weight[:, :, -1, -1], one, upper=False, unitriangular=True)
    corner = torch.zeros_like(weight)
    corner[:, :, -1, -1] = weight[:, :, -1, -1]
    return inverse, torch.einsum("oc,cikl->oikl", inverse, weight - corner)


def _skewed(x: Tensor) -> Tensor:
    """Shift row i of maps (N, C, H, W) by i: anti-diagonals become columns of (N, C, H, H + W - 1)."""
    n, channels, height, width = x.shape
    x = F.pad(x, (0, height)).flatten(2)
    return x[..., : height * (height + width - 1)].reshape(n, channels, height, height + width - 1)


def _straightened(x: Tensor, width: int) -> Tensor:
    """Undo `_skewed`."""
    n, channels, height, diagonals = x.shape
    x = F.pad(x.flatten(2), (0, height))
    return x.reshape(n, channels, height, diagonals + 1)[..., :width]


def sweep(y: Tensor, weight: Tensor) -> Tensor:
    """Solve for x, H + W - 1 anti-diagonals one after the other."""
    _, _, height, width = y.shape
    kh, kw = weight.shape[2:]
    inverse, taps = folded(weight)
    # Columns of the matrix go with what is gathered below: tap by tap, of each the channels.
    matrix = taps.permute(2, 3, 1, 0).flatten(0, 2)
    # Diagonal by diagonal (N, H, C), rows above the map included, which are zero.
    right = torch.einsum("oc,nchd->dnho", inverse, _skewed(y))
    zero = right.new_zeros(right.shape[1], kh - 1 + height, right.shape[3])
    solved = [zero] * (kh + kw - 2)
    for known in right.unbind():
        around = [
            solved[len(solved) - (kh - 1 - a) - (kw - 1 - b)][:, a : a + height]
            if a + b < kh + kw - 2
            else torch.zeros_like(known)
            for a in range(kh)
            for b in range(kw)
        ]
        pixel = known - torch.cat(around, -1) @ matrix
        solved.append(F.pad(pixel, (0, 0, kh - 1, 0)))
    x = torch.stack(solved[kh + kw - 2 :], -1)[:, kh - 1 :]
    return _straightened(x.permute(0, 2, 1, 3), width)


def gradients(
    solve: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients by y and by the weight.

    The first is the inverse of the transposed convolution, solved from the opposite corner, which is the corner
    convolution again once pixels and channels are reversed. The second is minus what it is for the convolution itself.
    """
    of_y = solve(grad.flip(1, 2, 3), weight.transpose(0, 1).flip(0, 1)).flip(1, 2, 3)
    kh, kw = weight.shape[2:]
    padded = F.pad(x, (kw - 1, 0, kh - 1, 0))
    of_weight = torch.nn.grad.conv2d_weight(padded, weight.shape, -of_y)  # type: ignore[arg-type]
    return of_y, of_weight * free(weight)


def free(weight: Tensor) -> Tensor:
    """Return 1 for every weight that is read, 0 for the corner tap's diagonal and what lies above it."""
    mask = torch.ones_like(weight)
    mask[:, :, -1, -1] = mask[:, :, -1, -1].tril(-1)
    return mask


class _Sweep(torch.autograd.Function):
    @staticmethod
    def forward(y: Tensor, weight: Tensor) -> Tensor:
        return sweep(y, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output, inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return gradients(_Sweep.apply, x, weight, grad)


def run(y: Tensor, weight: Tensor) -> Tensor:
    """Compute with matrix products, those of 16 bits in float32."""
    wide = torch.promote_types(y.dtype, torch.float32)
    x = _Sweep.apply(y.to(wide), weight.to(wide)).to(y.dtype)
    return x.contiguous(memory_format=memory_format(y))


def supports(y: Tensor, weight: Tensor) -> str | None:
    """Return None: every call is supported."""
    return None


def estimate(y: Tensor, weight: Tensor) -> float:
    """Return about how many seconds the call takes on a CPU: some operations for every anti-diagonal."""
    n, channels, height, width = y.shape
    products = n * height * (height + width) * channels * weight[0].numel()
    once = (height + width) * 3.5e-5 + products / 1.5e10
    return 3 * once if needs_grad(y, weight) else once
