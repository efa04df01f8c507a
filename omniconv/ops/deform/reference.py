"""Deformable aggregation as its equation reads: a double loop over the taps, with dense bilinear weights."""

import torch
from torch import Tensor

__all__ = ["reference"]

Pair = tuple[int, int]


def reference(
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    scale: float,
    keep_taps: bool,
) -> Tensor:
    r"""Return the aggregation of a prepared call, tap by tap.

    .. math:: y_{g}(p_0) = \sum_k m_{gk}(p_0)\, x_g(p_0 + s\,(p_k + \Delta p_{gk}(p_0))), \qquad
        x(p) = \sum_q \max(0, 1 - |q_y - p_y|) \max(0, 1 - |q_x - p_x|)\, x(q)
    """
    taps = kernel[0] * kernel[1]
    offset = offset.permute(0, 2, 3, 1).unflatten(-1, (-1, taps, 2))
    _, *size, groups, _, _ = offset.shape
    values = x.unflatten(1, (groups, -1))
    centre = [_centre(axis, size[axis], kernel, stride, padding, dilation).to(x) for axis in (0, 1)]
    samples = []
    for v in range(kernel[0]):
        for u in range(kernel[1]):
            k = v * kernel[1] + u
            row = centre[0][:, None, None] + scale * (_tap(0, v, kernel, dilation) + offset[..., k, 0])
            column = centre[1][:, None] + scale * (_tap(1, u, kernel, dilation) + offset[..., k, 1])
            rows, columns = _hat(row, x.shape[2]), _hat(column, x.shape[3])
            sample = torch.einsum("nijgh,nijgw,ngchw->ngcij", rows, columns, values)
            samples.append(sample if mask is None else mask[:, k::taps, None] * sample)
    kept = torch.stack(samples, 1).flatten(2, 3)
    return kept if keep_taps else kept.sum(1)


def _centre(axis: int, size: int, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """Return where along an axis the kernel's centre stands, for every output."""
    return stride[axis] * torch.arange(size) - padding[axis] + dilation[axis] * (kernel[axis] - 1) // 2


def _tap(axis: int, index: int, kernel: Pair, dilation: Pair) -> int:
    """Return where along an axis a tap stands, from the kernel's centre."""
    return dilation[axis] * index - dilation[axis] * (kernel[axis] - 1) // 2


def _hat(position: Tensor, size: int) -> Tensor:
    """Return the linear weight of each of `size` pixels at every position."""
    pixels = torch.arange(size).to(position)
    return (1 - (pixels - position[..., None]).abs()).clamp(min=0)
