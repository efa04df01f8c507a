"""Dense vision transformers made faster without training: their middle blocks run on a few cluster centres.

Paper: Liang et al., Expediting Large-Scale Vision Transformer for Dense Prediction without Fine-tuning,
https://arxiv.org/abs/2210.01035. The temperature is given in units of the tokens' variance here, so that one value
serves networks whose features are of any scale, and the weights of a reconstruction sum to one, as in the paper (the
official code for SAM divides by their Euclidean norm).
"""

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.compress.report import CompressionReport, compare

__all__ = ["ClusteredBlocks", "cluster_tokens", "expedite", "token_weights"]

M = TypeVar("M", bound=nn.Module)


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Return (N, L, M) for (N, L, C) and (N, M, C)."""
    mixed = torch.baddbmm(y.square().sum(2)[:, None], x, y.mT, alpha=-2)
    return (mixed + x.square().sum(2, keepdim=True)).clamp(min=0)


def _near(grid: tuple[int, int], size: tuple[int, int], window: int, like: Tensor) -> Tensor:
    """Return whether each centre lies in the window around the cell of each token, (h w, h' w')."""
    axes = []
    for length, count in zip(grid, size, strict=True):
        cells = torch.arange(length, device=like.device) * count // length
        centres = torch.arange(count, device=like.device)
        axes.append((cells[:, None] - centres).abs() <= window // 2)
    rows, columns = axes
    return (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2).flatten(0, 1)


def token_weights(tokens: Tensor, centres: Tensor, temperature: float | Tensor, neighbours: int) -> Tensor:
    r"""Return how much of each centre each token is made of, (N, L, M); every row sums to one.

    .. math:: w_{pi} \propto \exp(-\lVert z_p - s_i \rVert^2 / \tau)

    over the k centres nearest to the token in feature space.

    Args:
        tokens: z, (N, L, C).
        centres: s, (N, M, C).
        temperature: :math:`\tau`, a number or (N, 1, 1).
        neighbours: k; all centres if there are fewer.
    """
    logits = -_squared_distances(tokens, centres) / temperature
    if neighbours < centres.shape[1]:
        top, places = logits.topk(neighbours, 2)
        return torch.zeros_like(logits).scatter(2, places, top.softmax(2))
    return logits.softmax(2)


def cluster_tokens(
    tokens: Tensor, size: tuple[int, int], temperature: float | Tensor, iterations: int = 5, window: int = 5
) -> Tensor:
    r"""Return the centres (N, h', w', C) of a map of tokens (N, h, w, C) by local soft k-means.

    .. math:: q_{pi} \propto \exp(-\lVert z_p - s_i \rVert^2 / \tau), \qquad
              s_i \leftarrow \frac{\sum_p q_{pi} z_p}{\sum_p q_{pi}}

    from centres that are the means of the cells of a grid; a token belongs only to centres within a window around its
    own cell.

    Args:
        tokens: z.
        size: of the grid of centres.
        temperature: :math:`\tau`, a number or (N, 1, 1).
        iterations: of assigning and averaging.
        window: centres along a side of the neighbourhood, odd.
    """
    grid = (tokens.shape[1], tokens.shape[2])
    z = tokens.flatten(1, 2)
    s = F.adaptive_avg_pool2d(tokens.permute(0, 3, 1, 2), size).flatten(2).mT
    far = ~_near(grid, size, window, z)
    for _ in range(iterations):
        logits = -_squared_distances(z, s) / temperature
        q = logits.masked_fill(far, -torch.inf).softmax(2)
        s = q.mT @ z / q.sum(1)[:, :, None].clamp(min=torch.finfo(q.dtype).tiny)
    return s.unflatten(1, size)


class ClusteredBlocks(nn.Module):
    r"""Blocks that run on cluster centres of their tokens instead of the tokens.

    .. math:: y_p = \sum_i w_{pi}\, B(s)_i

    with the centres s of `cluster_tokens`, the blocks B, and the `token_weights` w between the tokens and the centres
    as they were before the blocks.

    Args:
        blocks: each keeps the shape of what it gets, for any number of tokens.
        scale: of the grid of centres, relative to that of the tokens.
        temperature: in units of the mean squared distance of an image's tokens from their mean.
        neighbours: centres of which a token is put together again.
        iterations, window: see `cluster_tokens`.
        grid: rows and columns of the tokens where they are a sequence; None for as many of both.
        prefix_tokens: tokens that come first in a sequence and belong to no place, such as the class token; they are
            not clustered and pass through the blocks.
        channels_last: maps are (N, H, W, C) instead of (N, C, H, W).

    Shapes:
        - input and output: tokens :math:`(N, P + L, C)`, or maps

    Raises:
        ValueError: if `scale` lies outside (0, 1], `window` is even, the tokens do not fill the grid, or a block
            changes the shape.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        scale: float = 0.5,
        *,
        temperature: float = 0.05,
        neighbours: int = 20,
        iterations: int = 5,
        window: int = 5,
        grid: tuple[int, int] | None = None,
        prefix_tokens: int = 0,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        if not 0 < scale <= 1:
            raise ValueError(f"scale must lie in (0, 1]: got {scale}")
        if window % 2 == 0:
            raise ValueError(f"window must be odd: got {window}")
        self.blocks = nn.Sequential(*blocks)
        self.scale, self.temperature, self.neighbours = scale, temperature, neighbours
        self.iterations, self.window = iterations, window
        self.grid, self.prefix_tokens, self.channels_last = grid, prefix_tokens, channels_last

    def _grid(self, count: int) -> tuple[int, int]:
        side = round(count**0.5)
        height, width = self.grid or (side, side)
        if height * width != count:
            raise ValueError(
                f"{count} tokens do not fill {height} rows of {width}: give grid, or prefix_tokens"
            )
        return height, width

    def forward(self, x: Tensor) -> Tensor:
        """Return what the blocks make of `x`, nearly."""
        if x.ndim == 3:
            z = x[:, self.prefix_tokens :]
            z = z.unflatten(1, self._grid(z.shape[1]))
        else:
            z = x if self.channels_last else x.permute(0, 2, 3, 1)
        height, width = (max(1, round(self.scale * length)) for length in z.shape[1:3])
        # Distances are more exact around the mean.
        mean = z.mean((1, 2), keepdim=True)
        spread = (z - mean).square().sum(3).mean((1, 2))[:, None, None]
        temperature = self.temperature * spread.clamp(min=torch.finfo(z.dtype).tiny)
        s = cluster_tokens(z - mean, (height, width), temperature, self.iterations, self.window)
        weights = token_weights((z - mean).flatten(1, 2), s.flatten(1, 2), temperature, self.neighbours)
        s = s + mean
        if x.ndim == 3:
            s = torch.cat([x[:, : self.prefix_tokens], s.flatten(1, 2)], 1)
        elif not self.channels_last:
            s = s.permute(0, 3, 1, 2)
        y = self.blocks(s)
        if y.shape != s.shape:
            raise ValueError(f"blocks must keep the shape: {tuple(s.shape)} became {tuple(y.shape)}")
        if x.ndim == 3:
            return torch.cat([y[:, : self.prefix_tokens], weights @ y[:, self.prefix_tokens :]], 1)
        y = y if self.channels_last else y.permute(0, 2, 3, 1)
        y = (weights @ y.flatten(1, 2)).unflatten(1, z.shape[1:3])
        return y if self.channels_last else y.permute(0, 3, 1, 2)


def expedite(
    model: M,
    blocks: Sequence[str],
    *,
    scale: float = 0.5,
    input_shape: tuple[int, ...] | None = None,
    **options: Any,
) -> tuple[M, CompressionReport]:
    r"""Run some blocks of a trained network on cluster centres (`Expedit <https://arxiv.org/abs/2210.01035>`_).

    It adds no parameters and needs no training. Names and shapes of what the network puts out stay as they were; the
    state dict's names of these blocks change.

    Args:
        model: any module; it stays as it is.
        blocks: dotted names of blocks that directly follow each other in one container, each of which keeps the shape
            of its input and takes any number of tokens; best from the middle of a deep network.
        scale: of the grid of centres, relative to that of the tokens, along a side.
        input_shape: of one sample, for example (3, 224, 224); the report counts multiply-adds if it is given.
        **options: of `ClusteredBlocks`, such as `prefix_tokens=1` for a network with a class token.

    Returns:
        The copy that computes less, and the report.

    Raises:
        ValueError: if the blocks do not follow each other in one container, or as `ClusteredBlocks`.
    """
    result = copy.deepcopy(model)
    folder = blocks[0].rpartition(".")[0] if blocks else ""
    container = result.get_submodule(folder)
    names = [name for name, _ in container.named_children()]
    prefix = f"{folder}." if folder else ""
    wanted = [name.removeprefix(prefix) for name in blocks]
    start = names.index(wanted[0]) if wanted and wanted[0] in names else -1
    if start < 0 or names[start : start + len(wanted)] != wanted:
        raise ValueError(f"blocks must follow each other in one container: got {list(blocks)}")
    first, *rest = wanted
    clustered = ClusteredBlocks([container.get_submodule(name) for name in wanted], scale, **options)
    container.set_submodule(first, clustered)
    for name in rest:
        container.set_submodule(name, nn.Identity())
    return result, compare("token clustering", model, result, input_shape=input_shape)
