"""Clustering by k-means: the codebook of vector quantization."""

import torch
from torch import Tensor

from omniconv.core.seeds import generator

__all__ = ["kmeans", "nearest"]


def nearest(points: Tensor, codebook: Tensor) -> Tensor:
    """Return the index of the entry (k, d) closest to each point (n, d)."""
    # The square of a point is the same for all entries. Some points at a time, because each has k distances.
    squares = codebook.square().sum(1)
    return torch.cat([(squares - 2 * part @ codebook.T).argmin(1) for part in points.split(1 << 15)])


@torch.no_grad()
def kmeans(points: Tensor, k: int, *, iterations: int = 50, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return the codebook (k, d) of Lloyd's algorithm and the index of each point's entry.

    It starts from points that are drawn far apart (k-means++). An entry that no point is closest to moves to the point
    that is farthest from its own.

    Args:
        points: (n, d), at least k of them.
        k: entries.
        iterations: at most.
        seed: of the first entries.

    Raises:
        ValueError: if there are fewer points than entries.
    """
    if not 1 <= k <= len(points):
        raise ValueError(f"k must be from 1 to the {len(points)} points: got {k}")
    random = generator(seed, "kmeans")
    first = int(torch.randint(len(points), (1,), generator=random))
    codebook = points[first : first + 1]
    apart = (points - codebook).square().sum(1)
    while len(codebook) < k:
        # Where all points have an entry already, any will do.
        weights = apart.double().cpu() if apart.any() else torch.ones(len(points), dtype=torch.float64)
        drawn = torch.searchsorted(
            weights.cumsum(0), torch.rand(1, generator=random).double() * weights.sum()
        )
        new = points[min(int(drawn), len(points) - 1)]
        codebook = torch.cat([codebook, new[None]])
        apart = torch.minimum(apart, (points - new).square().sum(1))
    codes = nearest(points, codebook)
    for _ in range(iterations):
        counts = torch.bincount(codes, minlength=k)
        sums = torch.zeros_like(codebook).index_add_(0, codes, points)
        codebook = sums / counts.clamp_min(1)[:, None]
        empty = (counts == 0).nonzero().flatten()
        if len(empty):
            farthest = (points - codebook[codes]).square().sum(1).topk(len(empty)).indices
            codebook[empty] = points[farthest]
        before, codes = codes, nearest(points, codebook)
        if torch.equal(before, codes):
            break
    return codebook, codes
