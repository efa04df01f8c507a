"""Pruning spaces: sub-networks of one network as a population, compared by how their errors are distributed.

Paper: He et al., Network Pruning Spaces, https://arxiv.org/abs/2304.09453. A space is all keep ratios of groups under
bounds on multiply-adds (the pruning regime), parameters, and the ratio of both, of which a regime has a best one.
Sample a space, train the sub-networks briefly, find that ratio with `optimal_ratio` and bound the space around it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from omniconv.compress.report import CompressionReport, compare
from omniconv.compress.structure.graph import Structure, trace_structure
from omniconv.core.seeds import generator

__all__ = [
    "PruningSpace",
    "Sample",
    "Subnetwork",
    "error_distribution",
    "keep_largest_units",
    "optimal_ratio",
    "space_pruning",
]

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Subnetwork:
    """One member of a pruning space.

    Attributes:
        counts: units that stay, by group.
        macs: share of the network's multiply-adds that stays.
        parameters: share of its parameters.
        spread: standard deviation of the groups' keep ratios.
    """

    counts: dict[str, int]
    macs: float
    parameters: float
    spread: float

    @property
    def ratio(self) -> float:
        """Multiply-adds for each parameter, in units of the whole network's."""
        return self.macs / self.parameters


@dataclass(frozen=True)
class Sample:
    """Members drawn from a space, and which share of the draws lay in it."""

    members: tuple[Subnetwork, ...]
    acceptance: float


@dataclass(frozen=True)
class PruningSpace:
    r"""All sub-networks within bounds (`network pruning spaces <https://arxiv.org/abs/2304.09453>`_).

    .. math:: \{ r \in (0, 1]^G : F(r) / F(1) \in I_F, \; P(r) / P(1) \in I_P, \;
       \tfrac{F(r)}{F(1)} \big/ \tfrac{P(r)}{P(1)} \in I_Q \}

    for multiply-adds F and parameters P of the network that keeps the share :math:`r_g` of the units of group g.

    Attributes:
        macs: least and largest share of multiply-adds that stays, the pruning regime.
        parameters: the same of parameters.
        ratio: the same of the ratio of both shares.
    """

    macs: tuple[float, float]
    parameters: tuple[float, float] = (0.0, 1.0)
    ratio: tuple[float, float] = (0.0, float("inf"))

    def holds(self, member: Subnetwork) -> bool:
        """Whether a sub-network lies in the space."""
        bounds = ((self.macs, member.macs), (self.parameters, member.parameters), (self.ratio, member.ratio))
        return all(low <= value <= high for (low, high), value in bounds)

    def sample(self, structure: Structure, count: int, *, seed: int = 0, tries: int = 100_000) -> Sample:
        r"""Draw members: keep ratios :math:`u_g^t`, u uniform in (0, 1), until enough of them lie in the space.

        The power t is that at which :math:`u_g = 1/2` everywhere keeps as many multiply-adds as the middle of the
        regime, so that deep networks, whose shares hardly scatter, are hit too.

        Args:
            structure: of the network.
            count: members.
            seed: of the draw.
            tries: vectors to draw at most.

        Raises:
            ValueError: if so many tries do not find so many members.
        """
        random = generator(seed, "pruning space")
        whole = structure.macs({}), structure.parameters({})
        groups = len(structure.groups)
        low, high = 0.0, 20.0
        while high - low > 1e-3:
            power = (low + high) / 2
            macs = structure.macs(
                _first_units(structure, _counts(structure, torch.full((groups,), 0.5**power)))
            )
            low, high = (power, high) if macs > sum(self.macs) / 2 * whole[0] else (low, power)
        members: list[Subnetwork] = []
        for tried in range(1, tries + 1):
            counts = _counts(structure, torch.rand(groups, generator=random) ** high)
            keep = _first_units(structure, counts)
            macs = structure.macs(keep) / whole[0]
            if self.macs[0] <= macs <= self.macs[1]:
                ratios = [count / structure.groups[name].size for name, count in counts.items()]
                parameters = structure.parameters(keep) / whole[1]
                member = Subnetwork(counts, macs, parameters, float(np.std(ratios)))
                members += [member] if self.holds(member) else []
            if len(members) == count:
                return Sample(tuple(members), count / tried)
        raise ValueError(f"{tries} draws found {len(members)} of {count} members; widen the space's bounds")


def _counts(structure: Structure, shares: Tensor) -> dict[str, int]:
    return {
        name: max(1, round(float(share) * group.size))
        for (name, group), share in zip(structure.groups.items(), shares, strict=True)
    }


def _first_units(structure: Structure, counts: Mapping[str, int]) -> dict[str, Tensor]:
    """Return masks to count with: units of a group cost alike, so any will do."""
    return {name: torch.arange(structure.groups[name].size) < count for name, count in counts.items()}


def keep_largest_units(
    model: nn.Module, structure: Structure, counts: Mapping[str, int]
) -> dict[str, Tensor]:
    """Return which units stay, by group: those of the largest sums of absolute weights.

    Args:
        model: the traced model.
        structure: of the model.
        counts: units that stay, by group.
    """
    norms = structure.scores({name: p.abs() for name, p in model.named_parameters() if p.ndim > 1})
    keep = {}
    for name, count in counts.items():
        keep[name] = torch.zeros(len(norms[name]), dtype=torch.bool)
        keep[name][norms[name].argsort(descending=True, stable=True)[:count]] = True
    return keep


def error_distribution(errors: Sequence[float], at: Sequence[float]) -> np.ndarray:
    r"""Return the empirical distribution function of a space's errors.

    .. math:: F(e) = \frac{1}{n} \sum_i [e_i < e]

    Args:
        errors: of its members.
        at: the errors e to return it at.
    """
    return np.searchsorted(np.sort(np.asarray(errors, float)), np.asarray(at, float), side="left") / len(
        errors
    )


def optimal_ratio(ratios: Sequence[float], errors: Sequence[float]) -> tuple[float, float]:
    """Return the ratio of least error by a parabola over its logarithm, and the curvature of the parabola.

    Where the curvature is not positive, or the vertex lies outside what was measured, there is no best ratio
    within, and the one of the better end is returned.

    Args:
        ratios: of sub-networks, `Subnetwork.ratio`.
        errors: theirs.
    """
    x, y = np.log(np.asarray(ratios, float)), np.asarray(errors, float)
    curvature, slope, _ = (parabola := np.polyfit(x, y, 2))
    ends = np.array([x.min(), x.max()])
    vertex = -slope / (2 * curvature) if curvature > 0 else np.inf
    best = vertex if ends[0] <= vertex <= ends[1] else ends[np.polyval(parabola, ends).argmin()]
    return float(np.exp(best)), float(2 * curvature)


def space_pruning(
    model: M,
    input_shape: tuple[int, ...],
    score: Callable[[M], float],
    space: PruningSpace = PruningSpace((0.49, 0.51)),
    *,
    count: int = 8,
    seed: int = 0,
    structure: Structure | None = None,
) -> tuple[M, CompressionReport]:
    """Return the best of some sub-networks drawn from a pruning space (`network pruning spaces <https://arxiv.org/abs/2304.09453>`_).

    Args:
        model: any module that runs on the meta device; it stays as it is.
        input_shape: of one sample, for example (3, 224, 224).
        score: gives what is to be large, such as the accuracy after brief training, in which it may change the
            network that it is given.
        space: to draw from, best one refined around the `optimal_ratio`.
        count: sub-networks to score.
        seed: of the draw.
        structure: of the model, if it is known already.

    Returns:
        The best one as `score` left it, a plain module, and the report.

    Raises:
        ValueError: if nothing can be removed, or the space is too narrow to find members.
    """
    structure = structure or trace_structure(model, input_shape)
    if not structure.groups:
        raise ValueError("no group of channels of this model can be removed; see trace_structure(...).fixed")
    drawn = space.sample(structure, count, seed=seed)
    candidates = [
        structure.remove(model, keep_largest_units(model, structure, member.counts))
        for member in drawn.members
    ]
    scores = [score(candidate) for candidate in candidates]
    best = int(np.argmax(scores))
    notes = (
        f"{drawn.acceptance:.2%} of the draws lay in the space.",
        f"The scores of {count} sub-networks reach from {min(scores):.4g} to {max(scores):.4g}; the best keeps "
        f"{drawn.members[best].macs:.1%} of the multiply-adds, {drawn.members[best].parameters:.1%} of the parameters.",
    )
    return candidates[best], compare(
        "pruning spaces", model, candidates[best], input_shape=input_shape, notes=notes
    )
