"""Structured pruning: whole channels, heads and groups go, and what is left is a plain, smaller network.

Papers: Li et al., Pruning Filters for Efficient ConvNets, https://arxiv.org/abs/1608.08710; Fang et al., DepGraph:
Towards Any Structural Pruning, https://arxiv.org/abs/2301.12900, for scores summed over all that goes together. Other
methods are other scores, or other ways to choose from them, on the same `Structure`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from omniconv.compress.report import CompressionReport, compare
from omniconv.compress.structure.graph import Structure, trace_structure

__all__ = ["choose_units", "choose_within", "structured_pruning", "unit_norms"]

M = TypeVar("M", bound=nn.Module)


def unit_norms(model: nn.Module, structure: Structure) -> dict[str, Tensor]:
    r"""Return by group the norm of every unit over all its weights, 1 on average over the group.

    .. math:: s_u = \sqrt{\textstyle\sum_{w \in u} w^2} \Big/ \frac{1}{U} \sum_v \sqrt{\textstyle\sum_{w \in v} w^2}

    Args:
        model: the traced model.
        structure: of the model.
    """
    squares = {name: weight.detach().square() for name, weight in model.named_parameters() if weight.ndim > 1}
    norms = {name: score.sqrt() for name, score in structure.scores(squares).items()}
    return {name: norm / norm.mean().clamp(min=1e-12) for name, norm in norms.items()}


def choose_units(
    scores: Mapping[str, Tensor],
    ratio: float,
    *,
    scope: Literal["layer", "network"] = "layer",
    multiple: int = 1,
) -> dict[str, Tensor]:
    """Return which units stay, by group: the best of every group, or of all groups together.

    Args:
        scores: by group, (units,); those of high score stay.
        ratio: share of units that go, in [0, 1).
        scope: "layer" takes this share from every group; "network" the lowest scores wherever they are.
        multiple: the number of units that stay in a group is rounded up to a multiple of it; one stays at least.

    Raises:
        ValueError: if `ratio` lies outside [0, 1), `multiple` is not positive, or `scope` is neither of them.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio must lie in [0, 1): got {ratio}")
    if multiple < 1:
        raise ValueError(f"multiple must be positive: got {multiple}")
    if scope not in ("layer", "network"):
        raise ValueError(f"scope must be layer or network: got {scope!r}")
    counts = {name: len(score) - round(ratio * len(score)) for name, score in scores.items()}
    if scope == "network" and scores:
        pooled = torch.cat(list(scores.values()))
        stay = torch.zeros(len(pooled), dtype=torch.bool)
        stay[pooled.argsort(descending=True, stable=True)[: len(pooled) - round(ratio * len(pooled))]] = True
        parts = stay.split([len(score) for score in scores.values()])
        counts = {name: int(part.sum()) for name, part in zip(scores, parts, strict=True)}
    keep = {}
    for name, score in scores.items():
        count = min(len(score), max(1, math.ceil(counts[name] / multiple)) * multiple)
        keep[name] = torch.zeros(len(score), dtype=torch.bool)
        keep[name][score.argsort(descending=True, stable=True)[:count]] = True
    return keep


def choose_within(
    structure: Structure,
    scores: Mapping[str, Tensor],
    ratio: float,
    *,
    of: Literal["parameters", "macs"] = "macs",
    scope: Literal["layer", "network"] = "layer",
    multiple: int = 1,
) -> dict[str, Tensor]:
    """Return which units stay, by group, so that at least a share of the parameters or multiply-adds goes.

    Args:
        structure: of the model.
        scores: see `choose_units`.
        ratio: share that goes, in [0, 1).
        of: what it is a share of.
        scope: see `choose_units`.
        multiple: see `choose_units`.

    Raises:
        ValueError: if so much cannot be removed; see also `choose_units`.
    """

    def chosen(share: float) -> dict[str, Tensor]:
        return choose_units(scores, share, scope=scope, multiple=multiple)

    count = structure.parameters if of == "parameters" else structure.macs
    low, high, whole = 0.0, 1.0 - 1e-6, count({})
    least = count(chosen(high))
    if least > (1 - ratio) * whole:
        raise ValueError(f"{ratio:.0%} of {of} cannot be removed: {least / whole:.0%} stay at least")
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if count(chosen(middle)) > (1 - ratio) * whole else (low, middle)
    return chosen(high)


def structured_pruning(
    model: M,
    input_shape: tuple[int, ...],
    ratio: float = 0.5,
    *,
    of: Literal["units", "parameters", "macs"] = "units",
    scores: Callable[[nn.Module, Structure], Mapping[str, Tensor]] = unit_norms,
    scope: Literal["layer", "network"] = "layer",
    multiple: int = 1,
    structure: Structure | None = None,
) -> tuple[M, CompressionReport]:
    r"""Remove the channels, heads and groups of lowest score (`DepGraph <https://arxiv.org/abs/2301.12900>`_).

    What is coupled by sums, norms, depthwise and grouped convolutions, concatenation or attention heads goes together;
    see `trace_structure`. Fine-tune afterwards.

    Args:
        model: any module that runs on the meta device; it stays as it is.
        input_shape: of one sample, for example (3, 224, 224).
        ratio: share to remove, in [0, 1).
        of: what it is a share of: units (about the square of it is left of parameters), parameters or multiply-adds;
            of the latter two at least this share goes.
        scores: by group a score for each unit, from the model and its structure; by default `unit_norms`.
        scope: "layer" for the same share everywhere, "network" to compare scores of different layers.
        multiple: units left in each group are rounded up to a multiple, as kernels like it.
        structure: of the model, if it is known already.

    Returns:
        The smaller copy, a plain module, and the report.

    Raises:
        ValueError: if `ratio` lies outside [0, 1), if nothing can be removed, or so much cannot.
    """
    if of not in ("units", "parameters", "macs"):
        raise ValueError(f"of must be units, parameters or macs: got {of!r}")
    structure = structure or trace_structure(model, input_shape)
    if not structure.groups:
        raise ValueError("no group of channels of this model can be removed; see trace_structure(...).fixed")
    points = scores(model, structure)

    if of == "units":
        keep = choose_units(points, ratio, scope=scope, multiple=multiple)
    else:
        keep = choose_within(structure, points, ratio, of=of, scope=scope, multiple=multiple)
    smaller = structure.remove(model, keep)
    removed, units = sum(int((~k).sum()) for k in keep.values()), sum(len(k) for k in keep.values())
    notes = [f"{removed} of {units} units in {len(keep)} groups removed."]
    if structure.fixed:
        notes.append(f"Left as they are: {', '.join(structure.fixed)}.")
    return smaller, compare("structured pruning", model, smaller, input_shape=input_shape, notes=tuple(notes))
