r"""The ConvFirst residual block, layer by layer or in tiles whose intermediate maps never leave the cache.

Paper: Lavin, On the Efficiency of Convolutional Neural Networks, https://arxiv.org/abs/2404.03617.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from omniconv.ops._numba import spread, unsupported

__all__ = ["BlockWeights", "convfirst", "convfirst_tiled"]


@dataclass(frozen=True)
class BlockWeights:
    """Weights of a ConvFirst block, norms folded into them.

    Attributes:
        conv: (C, C / groups, K, K) with K odd.
        conv_bias: (C,).
        expand: (E, C).
        expand_bias: (E,).
        project: (C, E).
        project_bias: (C,).
    """

    conv: Tensor
    conv_bias: Tensor
    expand: Tensor
    expand_bias: Tensor
    project: Tensor
    project_bias: Tensor


def convfirst(x: Tensor, weights: BlockWeights) -> Tensor:
    r"""Compute a ConvFirst block layer by layer (`paper <https://arxiv.org/abs/2404.03617>`_).

    .. math:: y = x + P\,\mathrm{ReLU}(E\,(G * x))

    with the grouped convolution G, the pointwise expansion E and projection P, each with a bias.

    Args:
        x: the map.
        weights: of the block.

    Shapes:
        - x: :math:`(N, C, H, W)`
        - output: :math:`(N, C, H, W)`
    """
    groups = x.shape[1] // weights.conv.shape[1]
    y = F.conv2d(x, weights.conv, weights.conv_bias, padding=weights.conv.shape[2] // 2, groups=groups)
    y = F.conv2d(y, weights.expand[:, :, None, None], weights.expand_bias).relu()
    return x + F.conv2d(y, weights.project[:, :, None, None], weights.project_bias)


def convfirst_tiled(
    x: Tensor, weights: BlockWeights, *, tile: tuple[int, int] = (8, 16)
) -> tuple[Tensor, int]:
    """Compute what `convfirst` does as one compiled kernel on a CPU, tile by tile, without gradients.

    A tile reads its pixels and a border of K // 2 more once, keeps everything between in a buffer, and writes
    its output; the residual comes from what it has read.

    Args:
        x: the map; in channels-last format nothing is copied.
        weights: of the block.
        tile: rows and columns of output that are computed at a time.

    Returns:
        The map (N, C, H, W), channels-last, and how many entries the tiles loaded and stored, counted one by one
        where that happens.

    Raises:
        ValueError: if the kernel is even, a side of the tile is not positive, or the tensors cannot be taken.
    """
    size = weights.conv.shape[2]
    if size % 2 == 0 or weights.conv.shape[3] != size:
        raise ValueError(f"the kernel must be square and odd: got {tuple(weights.conv.shape[2:])}")
    if min(tile) < 1:
        raise ValueError(f"tile must be positive: got {tile}")
    parts = [getattr(weights, name).detach() for name in BlockWeights.__dataclass_fields__]
    reason = unsupported(x, *parts)
    if reason is not None:
        raise ValueError(f"tiles cannot be computed: {reason}")
    from omniconv.ops.convfirst._kernels import tiles

    pixels = x.detach().permute(0, 2, 3, 1).contiguous()
    out = torch.empty_like(pixels)
    conv, conv_bias, expand, expand_bias, project, project_bias = parts
    # Taps first and outputs last, so that the innermost loops run over memory.
    groups = x.shape[1] // conv.shape[1]
    taps = conv.unflatten(0, (groups, -1)).permute(3, 4, 0, 2, 1).contiguous()
    down, across = -(-x.shape[2] // tile[0]), -(-x.shape[3] // tile[1])
    count = len(x) * down * across
    moved = torch.zeros(count, dtype=torch.int64)
    matrices = (expand.t().contiguous(), expand_bias, project.t().contiguous(), project_bias)
    spread(tiles, count, pixels, out, taps, conv_bias, *matrices, *tile, moved)
    return out.permute(0, 3, 1, 2), int(moved.sum())
