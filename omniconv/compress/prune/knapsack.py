"""Knapsack pruning: which channels to keep is one knapsack over the whole network, and the parent teaches what is left.

Paper: Aflalo et al., Knapsack Pruning with Inner Distillation, https://arxiv.org/abs/2002.08258. A unit's value is the
first-order change of the loss without it, its weight what it costs; units that are tied go together, as `Structure`
says. Prune with `knapsack_pruning`, then train `InnerDistillation`.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.compress.prune.rd_prune import allocate
from omniconv.compress.report import CompressionReport, compare
from omniconv.compress.structure.graph import Structure, trace_structure

__all__ = ["InnerDistillation", "fill_knapsack", "knapsack", "knapsack_pruning", "taylor_scores"]

M = TypeVar("M", bound=nn.Module)
Loss = Callable[[nn.Module], Tensor]

# Of a larger group only so many numbers of units are tried, and a larger knapsack has only so many levels.
_OPTIONS, _LEVELS = 128, 2000


def taylor_scores(model: nn.Module, structure: Structure, losses: Iterable[Loss]) -> dict[str, Tensor]:
    r"""Return by group how much the loss may change without each unit, to first order.

    .. math:: s_u = \sum_b \sum_{w \in u} \Big| w \, \frac{\partial L_b}{\partial w} \Big|

    over all parameters that go with the unit. Terms of a trained network cancel, so that their sum says little; the
    sum of their sizes bounds it.

    Args:
        model: the traced model; it stays as it is, and is scored in eval mode.
        structure: of the model.
        losses: each gives the loss of a model on one batch b.
    """
    shadow = copy.deepcopy(model).eval().requires_grad_(True)
    names, weights = zip(*shadow.named_parameters(), strict=True)
    totals = {name: torch.zeros_like(weight) for name, weight in zip(names, weights, strict=True)}
    for loss in losses:
        gradients = torch.autograd.grad(loss(shadow), weights, allow_unused=True)
        for name, weight, gradient in zip(names, weights, gradients, strict=True):
            if gradient is not None:
                totals[name] += (weight.detach() * gradient).abs()
    return structure.scores(totals)


def knapsack(
    values: Mapping[str, Tensor], weights: Mapping[str, int], capacity: int, *, least: int = 0
) -> dict[str, Tensor]:
    r"""Return which units to keep, by group, so that the sum of their values is largest.

    .. math:: \max_{k \in \{0, 1\}^U} \sum_u k_u v_u \quad \text{such that} \quad \sum_u k_u c_u \le C

    Units of a group weigh the same, so the best of each stay and only their number is open; it is found by
    dynamic programming. Groups of one unit make it the plain 0/1 knapsack.

    Args:
        values: by group, (units,).
        weights: of one unit of each group.
        capacity: of the knapsack. Up to 2,000 it is exact; in a larger one weights are rounded up to a 2,000th.
        least: units that every group keeps.

    Raises:
        ValueError: if what every group keeps exceeds the capacity.
    """
    spare = capacity - sum(min(least, len(value)) * weights[name] for name, value in values.items())
    if spare < 0:
        raise ValueError(f"capacity {capacity} is too small for {least} units of every group; raise it")
    counts, lost = [], []
    for value in values.values():
        first, size = min(least, len(value)), len(value)
        tried = np.unique(np.linspace(size, first, min(_OPTIONS, size - first + 1)).round().astype(int))[::-1]
        kept = value.double().sort(descending=True).values.cumsum(0)
        worth = torch.cat([torch.zeros(1, dtype=torch.float64), kept])
        counts.append(tried.tolist())
        lost.append((worth[-1] - worth[tried.copy()]).tolist())
    more = [
        [(count - tried[-1]) * weights[name] for count in tried]
        for name, tried in zip(values, counts, strict=True)
    ]
    levels = allocate(more, lost, spare, steps=_LEVELS)
    keep = {}
    for (name, value), tried, level in zip(values.items(), counts, levels, strict=True):
        keep[name] = torch.zeros(len(value), dtype=torch.bool)
        keep[name][value.argsort(descending=True, stable=True)[: tried[level]]] = True
    return keep


def knapsack_pruning(
    model: M,
    input_shape: tuple[int, ...],
    losses: Iterable[Loss],
    ratio: float = 0.5,
    *,
    of: Literal["macs", "parameters"] = "macs",
    structure: Structure | None = None,
) -> tuple[M, CompressionReport]:
    r"""Remove the channels that are worth least for what they cost (`knapsack pruning <https://arxiv.org/abs/2002.08258>`_).

    The value of a unit is its share of the loss (`taylor_scores`), its weight what the network saves without it
    (`fill_knapsack`).

    Args:
        model: any module that runs on the meta device; it stays as it is.
        input_shape: of one sample, for example (3, 224, 224).
        losses: each gives the loss of a model on one batch; some ten batches do.
        ratio: share of multiply-adds or parameters to remove at least, in [0, 1).
        of: what it is a share of.
        structure: of the model, if it is known already.

    Returns:
        The smaller copy, a plain module, and the report.

    Raises:
        ValueError: if `ratio` lies outside [0, 1), if nothing can be removed, or so much cannot.
    """
    structure = structure or trace_structure(model, input_shape)
    if not structure.groups:
        raise ValueError("no group of channels of this model can be removed; see trace_structure(...).fixed")
    keep = fill_knapsack(structure, taylor_scores(model, structure, losses), ratio, of=of)
    smaller = structure.remove(model, keep)
    left = ", ".join(f"{name} {int(kept.sum())} of {len(kept)}" for name, kept in keep.items())
    return smaller, compare(
        "knapsack pruning", model, smaller, input_shape=input_shape, notes=(f"Units left: {left}.",)
    )


def fill_knapsack(
    structure: Structure,
    values: Mapping[str, Tensor],
    ratio: float,
    *,
    of: Literal["macs", "parameters"] = "macs",
) -> dict[str, Tensor]:
    r"""Return which units to keep, by group, for the most value within a budget of the whole network.

    The weight :math:`c_u` of a unit is what the network saves without it alone, in its own layers and in those that
    read it. As layers shrink their neighbours' units become cheaper, so :math:`\sum c_u` is more than the network
    costs. The capacity is therefore searched whose solution, counted exactly, is the largest within the budget.

    Args:
        structure: of the network.
        values: by group, (units,), such as `taylor_scores`.
        ratio: share of multiply-adds or parameters to remove at least, in [0, 1).
        of: what it is a share of.

    Raises:
        ValueError: if `ratio` lies outside [0, 1), or one unit of every group is too much.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio must lie in [0, 1): got {ratio}")
    if of not in ("macs", "parameters"):
        raise ValueError(f"of must be macs or parameters: got {of!r}")
    cost = structure.macs if of == "macs" else structure.parameters
    whole, budget = cost({}), (1 - ratio) * cost({})
    weights = {name: whole - cost({name: torch.arange(len(value)) > 0}) for name, value in values.items()}
    low, high = sum(weights.values()), sum(weights[name] * len(value) for name, value in values.items())
    keep = knapsack(values, weights, low, least=1)
    if cost(keep) > budget:
        raise ValueError(
            f"{ratio:.0%} of {of} cannot be removed: one unit of every group is {cost(keep) / whole:.0%}"
        )
    while high - low > low // 500:
        middle = (low + high + 1) // 2
        found = knapsack(values, weights, middle, least=1)
        if cost(found) <= budget:
            low, keep = middle, max(keep, found, key=cost)
        else:
            high = middle - 1
    return keep


@contextmanager
def _outputs(model: nn.Module, layers: Sequence[str]) -> Any:
    """Collect copies of what layers put out, as what follows may work in place."""
    found: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name in layers:

            def keep(_module: nn.Module, _inputs: Any, output: Tensor, name: str = name) -> None:
                found[name] = output.clone()

            stack.callback(model.get_submodule(name).register_forward_hook(keep).remove)
        yield found


class InnerDistillation(nn.Module):
    r"""A pruned network that says how far it is from its parent inside (`inner distillation <https://arxiv.org/abs/2002.08258>`_).

    .. math:: L = L_{CE} + \frac{\gamma}{|B| + 1} \sum_{b \in B \cup \{\text{answer}\}}
       \overline{(P_b f_b(x) - f'_b(x))^2}

    over the feature maps of the layers B and the answers; :math:`P_b` is the identity where the pruned network f has
    all channels of the parent f', and else a learned linear map from those it has. Train this module's parameters,
    those of `student` and of the maps; the parent is none of them.

    Args:
        student: the pruned network.
        parent: what it was; run in eval mode and without gradients.
        x: one batch, from which shapes are learned.
        layers: names of the modules whose outputs are compared; those of `student.feature_info` by default.
        gamma: weight of the distance.

    Shapes:
        - Input: what the student takes, (N, ...)
        - Output: the student's answer and the weighted distance, a scalar

    Raises:
        ValueError: if no layers are named and the student has no `feature_info`, or if maps differ in more than one
            dimension.
    """

    def __init__(
        self,
        student: nn.Module,
        parent: nn.Module,
        x: Tensor,
        layers: Sequence[str] | None = None,
        *,
        gamma: float = 0.5,
    ) -> None:
        super().__init__()
        info: Any = getattr(student, "feature_info", None)
        if layers is None and not info:
            raise ValueError(f"{type(student).__name__} has no feature_info: name layers to compare")
        self.layers = tuple(layers) if layers is not None else tuple(stage["module"] for stage in info)
        self.student = student
        self.gamma = gamma
        # In a tuple, where it is no part of this module.
        self._parent = (copy.deepcopy(parent).eval().requires_grad_(False),)
        self.maps = nn.ModuleDict()
        self._axes: dict[str, int] = {}
        mode = student.training
        with torch.no_grad():
            pairs = self._pairs(self.student.eval(), x)
        student.train(mode)
        for name, (found, wanted) in pairs.items():
            axes = [d for d in range(wanted.ndim) if found.shape[d] != wanted.shape[d]]
            if len(axes) > 1:
                raise ValueError(
                    f"{name}: {tuple(found.shape)} and {tuple(wanted.shape)} differ in more than channels; "
                    "name other layers"
                )
            if axes:
                key, axis = name.replace(".", "/"), axes[0]
                self._axes[name] = axis
                self.maps[key] = nn.Linear(
                    found.size(axis), wanted.size(axis), bias=False, device=x.device, dtype=found.dtype
                )

    def _pairs(self, student: nn.Module, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        (parent,) = self._parent
        with torch.no_grad(), _outputs(parent, self.layers) as wanted:
            wanted[""] = parent(x)
        with _outputs(student, self.layers) as found:
            found[""] = student(x)
        return {name: (found[name], wanted[name]) for name in (*self.layers, "")}

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the answer of the student and its weighted distance from the parent."""
        pairs = self._pairs(self.student, x)
        distances = []
        for name, (found, wanted) in pairs.items():
            if name in self._axes:
                axis = self._axes[name]
                found = self.maps[name.replace(".", "/")](found.movedim(axis, -1)).movedim(-1, axis)
            distances.append(F.mse_loss(found, wanted))
        return pairs[""][0], self.gamma * torch.stack(distances).mean()
