"""Pruning by explaining: the units go that contributed least to the right answers of a few reference samples.

Paper: Yeom et al., Pruning by Explaining: A Novel Criterion for Deep Neural Network Pruning,
https://arxiv.org/abs/1912.08881. The criterion is `lrp_scores`; `choose_stepwise` prunes by it, or by any other score,
a little at a time.
"""

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from omniconv.compress.prune.relevance import relevance
from omniconv.compress.prune.structured import choose_units
from omniconv.compress.report import CompressionReport, compare
from omniconv.compress.structure.graph import Structure, trace_structure

__all__ = ["choose_stepwise", "lrp_pruning", "lrp_scores"]

M = TypeVar("M", bound=nn.Module)
Scores = Callable[[nn.Module, Structure], Mapping[str, Tensor]]


def lrp_scores(
    model: nn.Module, structure: Structure, x: Tensor, labels: Tensor, *, beta: float = 0.0
) -> dict[str, Tensor]:
    r"""Return by group the relevance of every unit for the right answers.

    .. math:: s_u = \sum_n \sum_{w \in u} R_w(x_n)

    Through the weights that make a unit flows what it contributed, and it flows through those that read it too.

    Args:
        model: the traced model, which gives logits (N, K); it stays as it is.
        structure: of the model.
        x: reference samples (N, ...), some ten of every class.
        labels: their classes (N,).
        beta: see `omniconv.compress.prune.relevance.RelevanceRules`.
    """
    return structure.scores(relevance(model, x, labels, beta=beta)[1])


def choose_stepwise(
    model: nn.Module, structure: Structure, scores: Scores, ratio: float, *, step: float = 0.05
) -> dict[str, Tensor]:
    r"""Return which units stay, by group, when the worst go step by step and the rest is scored anew each time.

    .. math:: \hat s_u = s_u \Big/ \sqrt{\textstyle\sum_{v \in \text{group}} s_v^2}

    are compared over the whole network; every group keeps one unit at least.

    Args:
        model: the traced model; it stays as it is.
        structure: of the model.
        scores: by group a score for each unit, from a model in which what is gone is zero, and the structure.
        ratio: share of all units that go, in [0, 1).
        step: share of all units that go before the next scoring.

    Raises:
        ValueError: if `ratio` lies outside [0, 1) or `step` is not positive.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio must lie in [0, 1): got {ratio}")
    if step <= 0:
        raise ValueError(f"step must be positive: got {step}")
    keep = {name: torch.ones(group.size, dtype=torch.bool) for name, group in structure.groups.items()}
    gone = 0.0
    while gone < ratio:
        gone = min(gone + step, ratio)
        found = scores(structure.mask(model, keep), structure)
        left = {
            name: (score / score.norm().clamp(min=1e-12)).masked_fill(~keep[name], -torch.inf)
            for name, score in found.items()
        }
        keep = choose_units(left, gone, scope="network")
    return keep


def lrp_pruning(
    model: M,
    input_shape: tuple[int, ...],
    x: Tensor,
    labels: Tensor,
    ratio: float = 0.5,
    *,
    step: float = 0.05,
    beta: float = 0.0,
    structure: Structure | None = None,
) -> tuple[M, CompressionReport]:
    """Remove the channels that contributed least to the right answers (`LRP pruning <https://arxiv.org/abs/1912.08881>`_).

    Made for networks that move to a task with few samples and are not trained after it.

    Args:
        model: any module that gives logits (N, K) and runs on the meta device; it stays as it is.
        input_shape: of one sample, for example (3, 224, 224).
        x: reference samples (N, ...), some ten of every class.
        labels: their classes (N,).
        ratio: share of all units to remove, in [0, 1).
        step: share that goes before relevance is computed anew; `ratio` for one shot.
        beta: see `omniconv.compress.prune.relevance.RelevanceRules`.
        structure: of the model, if it is known already.

    Returns:
        The smaller copy, a plain module, and the report.

    Raises:
        ValueError: if `ratio` lies outside [0, 1), `step` is not positive, or nothing can be removed.
    """
    structure = structure or trace_structure(model, input_shape)
    if not structure.groups:
        raise ValueError("no group of channels of this model can be removed; see trace_structure(...).fixed")

    def scores(masked: nn.Module, graph: Structure) -> dict[str, Tensor]:
        return lrp_scores(masked, graph, x, labels, beta=beta)

    keep = choose_stepwise(model, structure, scores, ratio, step=step)
    smaller = structure.remove(model, keep)
    removed, units = sum(int((~kept).sum()) for kept in keep.values()), sum(map(len, keep.values()))
    note = f"{removed} of {units} units in {len(keep)} groups removed."
    return smaller, compare("LRP pruning", model, smaller, input_shape=input_shape, notes=(note,))
