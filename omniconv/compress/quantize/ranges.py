"""The range of a tensor that a quantizer is to cover: its extremes, or less and finer where that pays.

Every method takes rows (R, n), each with a range of its own, and returns lowest and highest values, (R, 1) each.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["RANGES", "entropy", "extremes", "least_error", "percentile"]

_SAMPLE = 1 << 16
_SHRINK = torch.linspace(1.0, 0.1, 46)
_BINS = 2048

Round = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From rows and their lowest and highest values to the rows as the quantizer would give them back."""


def _sample(rows: Tensor) -> Tensor:
    """Return about 2^16 values of every row, evenly spaced."""
    return rows[:, :: max(1, rows.shape[1] // _SAMPLE)]


def extremes(rows: Tensor, quantized: Round, levels: int) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest value."""
    return rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)


def percentile(rows: Tensor, quantized: Round, levels: int, share: float = 0.999) -> tuple[Tensor, Tensor]:
    """Return the values that leave out the same small share at either end."""
    ordered = _sample(rows).sort(1).values
    last = ordered.shape[1] - 1
    high = round(share * last)
    return ordered[:, last - high, None], ordered[:, high, None]


def least_error(rows: Tensor, quantized: Round, levels: int) -> tuple[Tensor, Tensor]:
    """Return the extremes, shrunk alike, that give the least squared error."""
    rows = _sample(rows)
    low, high = extremes(rows, quantized, levels)
    best = rows.new_full(low.shape, torch.inf)
    keep = torch.ones_like(low)
    for shrink in _SHRINK.tolist():
        error = (quantized(rows, low * shrink, high * shrink) - rows).square().mean(1, keepdim=True)
        keep = torch.where(error < best, shrink, keep)
        best = torch.minimum(error, best)
    return low * keep, high * keep


def entropy(rows: Tensor, quantized: Round, levels: int) -> tuple[Tensor, Tensor]:
    r"""Return the extremes, cut at the magnitude whose histogram loses least information.

    .. math:: \min_t \mathrm{KL}(P_t \,\|\, Q_t)

    with the histogram P of magnitudes up to t, all beyond it counted in the last bin, and Q its average over
    the bins that share a level.
    """
    rows = _sample(rows)
    low, high = extremes(rows, quantized, levels)
    cut = torch.stack([_cut(row, levels if row.amin() >= 0 else levels // 2) for row in rows])[:, None]
    return low.maximum(-cut), high.minimum(cut)


def _cut(row: Tensor, levels: int) -> Tensor:
    magnitude = row.abs()
    top = magnitude.amax()
    # With few values a fine histogram is mostly holes.
    total = min(_BINS, max(4 * levels, 4 * math.isqrt(len(row))))
    # Zeros come out exact whatever the range, and after a ReLU they are the most.
    counts = torch.histc(magnitude[magnitude > 0], total, 0, float(top)) if top > 0 else row.new_zeros(total)
    best, found = torch.inf, total
    for bins in range(levels, total + 1, max(1, total // 128)):
        p = counts[:bins].clone()
        q = _averaged(p, levels)
        p[-1] += counts[bins:].sum()
        p, q = p / p.sum(), q / q.sum()
        held = p > 0
        loss = float((p[held] * (p[held] / q[held].clamp(min=1e-12)).log()).sum())
        if loss < best:
            best, found = loss, bins
    return top * found / total


def _averaged(counts: Tensor, levels: int) -> Tensor:
    """Return the counts with those of one level spread evenly over its bins that are not empty."""
    level = torch.arange(len(counts), device=counts.device) * levels // len(counts)
    held = (counts > 0).to(counts)
    total, filled = (counts.new_zeros(levels).index_add(0, level, part) for part in (counts, held))
    return (total / filled.clamp(min=1))[level] * held


RANGES: dict[str, Callable[[Tensor, Round, int], tuple[Tensor, Tensor]]] = {
    "minmax": extremes,
    "percentile": percentile,
    "mse": least_error,
    "entropy": entropy,
}
