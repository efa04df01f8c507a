"""Short kernels: the direct sum of `omniconv.ops.depthwise_conv`."""

import torch
from torch import Tensor

from omniconv.ops.depthwise_conv.api import depthwise_conv


def weight(x: Tensor, kernel: Tensor) -> Tensor:
    """Return kernels as torch's convolutions take them, last tap first."""
    return kernel.to(x.dtype).flip(list(range(1, kernel.ndim))).unsqueeze(1)


def padding(kernel: Tensor, origin: tuple[int, ...]) -> list[int]:
    """Return how many zeros both sides of every axis get: those of the side that needs more."""
    return [max(k - 1 - o, o) for k, o in zip(kernel.shape[1:], origin, strict=True)]


def convolve(x: Tensor, kernel: Tensor, origin: tuple[int, ...]) -> Tensor:
    """Convolve directly."""
    sides = padding(kernel, origin)
    y = depthwise_conv(x, weight(x, kernel), padding=sides)
    for axis, side in enumerate(sides):
        y = y.narrow(axis + 2, side - (kernel.shape[axis + 1] - 1 - origin[axis]), x.shape[axis + 2])
    return y


def supports(x: Tensor, *rest: object) -> str | None:
    """Return None, or why the call cannot be computed here."""
    if x.ndim > 5:
        return f"it is for one to three axes, not {x.ndim - 2}"
    if x.dtype not in (torch.float32, torch.float64):
        return f"it is for float32 and float64, not {x.dtype}"
    return None
