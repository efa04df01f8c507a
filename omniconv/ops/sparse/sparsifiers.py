"""Sparsifiers of `STen <https://arxiv.org/abs/2304.07613>`_: which entries of a tensor stay.

Each gives a mask, which any layout that takes masks can keep; those of structured layouts are registered for them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from omniconv.ops.sparse.base import Layout
from omniconv.ops.sparse.layouts import NM, Block, GroupedNM

__all__ = [
    "BlockFraction",
    "GroupedNOfM",
    "KeepAll",
    "NOfM",
    "RandomFraction",
    "ScalarFraction",
    "ScalarThreshold",
    "Sparsifier",
    "register_sparsifier",
    "sparsify",
]


class Sparsifier(Protocol):
    """Chooses entries."""

    def mask(self, dense: Tensor) -> Tensor:
        """Return True where an entry stays."""
        ...


@dataclass(frozen=True)
class KeepAll:
    """Keep what is not zero."""

    def mask(self, dense: Tensor) -> Tensor:
        """Return True where an entry stays."""
        return dense != 0


@dataclass(frozen=True)
class RandomFraction:
    """Drop a fraction of the entries at random."""

    fraction: float

    def mask(self, dense: Tensor) -> Tensor:
        """Return True where an entry stays."""
        return _largest(torch.rand(dense.shape, device=dense.device), self.fraction)


@dataclass(frozen=True)
class ScalarThreshold:
    """Drop magnitudes below a threshold."""

    threshold: float

    def mask(self, dense: Tensor) -> Tensor:
        """Return True where an entry stays."""
        return dense.abs() >= self.threshold


@dataclass(frozen=True)
class ScalarFraction:
    """Drop the fraction of entries that have the smallest magnitudes."""

    fraction: float

    def mask(self, dense: Tensor) -> Tensor:
        """Return True where an entry stays."""
        return _largest(dense.abs(), self.fraction)


@dataclass(frozen=True)
class BlockFraction:
    """Drop the fraction of blocks of a matrix that have the smallest sums of magnitudes."""

    fraction: float
    size: tuple[int, int]

    def mask(self, dense: Tensor) -> Tensor:
        """Return True where an entry stays."""
        return _keep_blocks(self, dense).mask


@dataclass(frozen=True)
class NOfM:
    """Keep the n largest magnitudes of every m neighbours in a row."""

    n: int
    m: int

    def mask(self, dense: Tensor) -> Tensor:
        """Return True where an entry stays."""
        return NM.largest(dense, self.n, self.m).mask


@dataclass(frozen=True)
class GroupedNOfM:
    """Keep n of every m neighbours so that every pattern is that of g rows of a chunk."""

    n: int
    m: int
    g: int

    def mask(self, dense: Tensor) -> Tensor:
        """Return True where an entry stays."""
        return GroupedNM.largest(dense, self.n, self.m, self.g).mask


def _largest(scores: Tensor, fraction: float) -> Tensor:
    """Return a mask that drops exactly the fraction of entries with the smallest scores."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must lie in [0, 1]: got {fraction}")
    kept = scores.numel() - round(fraction * scores.numel())
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[scores.detach().flatten().topk(kept).indices] = True
    return mask.reshape(scores.shape)


_SPARSIFIERS: dict[tuple[type, type], Callable[[Any, Tensor], Layout]] = {}


def register_sparsifier(sparsifier: type, layout: type[Layout]) -> Callable[[Any], Any]:
    """Register a function of (sparsifier, dense tensor) that gives a layout, instead of a mask put into it."""

    def register(function: Callable[[Any, Tensor], Layout]) -> Callable[[Any, Tensor], Layout]:
        _SPARSIFIERS[sparsifier, layout] = function
        return function

    return register


@register_sparsifier(BlockFraction, Block)
def _keep_blocks(sparsifier: BlockFraction, dense: Tensor) -> Block:
    sums = Block.blocks(dense, sparsifier.size).abs().sum((2, 3))
    return Block.chosen(dense, sparsifier.size, _largest(sums, sparsifier.fraction))


@register_sparsifier(NOfM, NM)
def _keep_n_of_m(sparsifier: NOfM, dense: Tensor) -> NM:
    return NM.largest(dense, sparsifier.n, sparsifier.m)


@register_sparsifier(GroupedNOfM, GroupedNM)
def _keep_grouped(sparsifier: GroupedNOfM, dense: Tensor) -> GroupedNM:
    return GroupedNM.largest(dense, sparsifier.n, sparsifier.m, sparsifier.g)


def sparsify(x: Tensor | Layout, sparsifier: Sparsifier, layout: type) -> Any:
    """Return x in another layout, with what a sparsifier keeps of it.

    Args:
        x: a tensor or a layout.
        sparsifier: chooses entries; `KeepAll` keeps those that a layout has, zeros among them.
        layout: a subclass of `Layout`, or `torch.Tensor`.

    Raises:
        TypeError: if the layout takes no masks and no sparsifier is registered for it.
    """
    keep = isinstance(sparsifier, KeepAll)
    if keep and isinstance(x, layout):
        return x
    dense = x.dense() if isinstance(x, Layout) else x
    if keep and layout is Tensor:
        return dense
    if function := _SPARSIFIERS.get((type(sparsifier), layout)):
        return function(sparsifier, dense)
    mask = x.mask if keep and isinstance(x, Layout) else sparsifier.mask(dense.detach())
    return torch.where(mask, dense, 0) if layout is Tensor else layout.from_mask(dense, mask)
