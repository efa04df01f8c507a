"""Two networks of one architecture in one: which units correspond, and the network in which they share places.

Paper: Nasery et al., PLeaS, https://arxiv.org/abs/2407.02447, for units that stay side by side where they do not match;
Ainsworth et al., Git Re-Basin, https://arxiv.org/abs/2209.04836, for matching by activations. Units are those of
`trace_structure`: layers tied by sums share theirs.
"""

import copy
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from omniconv.compress.structure.graph import Slice, Structure

__all__ = ["Axis", "Match", "lay_out", "match_units", "merge_units", "record_calls"]

M = TypeVar("M", bound=nn.Module)
Axes = Mapping[tuple[str, int], "Axis"]


@dataclass(frozen=True)
class Match:
    """Which units of a second network correspond to those of a first.

    Attributes:
        order: for each unit of the first network the unit of the second, a permutation.
        score: the correlation of the two.
    """

    order: Tensor
    score: Tensor


@dataclass(frozen=True)
class Axis:
    """How a dimension of the merged network is made of the same dimension of the two.

    Attributes:
        first, second: for each new place the place in each network, -1 where it has none.
    """

    first: Tensor
    second: Tensor

    @property
    def shares(self) -> tuple[Tensor, Tensor]:
        """What each network counts at each place: half where both stand, else one or nothing."""
        both = 1 - 0.5 * ((self.first >= 0) & (self.second >= 0)).float()
        return both * (self.first >= 0), both * (self.second >= 0)

    def gather(
        self, values: tuple[Tensor, Tensor], dim: int, shares: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return both networks' values at the new places along `dim`, times what they count."""
        spread = [1] * values[0].ndim
        spread[dim] = -1
        first, second = (
            value.index_select(dim, places.clamp(min=0).to(value.device)) * share.to(value).view(spread)
            for value, places, share in zip(values, (self.first, self.second), shares, strict=True)
        )
        return first, second


def record_calls(model: nn.Module, x: Tensor) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Return by name of convolutions and linear layers what they read and wrote in eval mode, call by call."""
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {}
    read: dict[str, Tensor] = {}

    # Copies, as what follows may work in place.
    def enter(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        read[name] = args[0].clone()

    def leave(name: str, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        calls.setdefault(name, []).append((read[name], output.clone()))

    model = copy.deepcopy(model).eval()
    for name, module in model.named_modules():
        if isinstance(module, _ConvNd | nn.Linear):
            module.register_forward_pre_hook(functools.partial(enter, name))
            module.register_forward_hook(functools.partial(leave, name))
    model(x)
    return calls


@dataclass(frozen=True)
class _Site:
    """Where units of a group can be seen: among the channels that a layer reads (0) or writes (1)."""

    group: str
    layer: str
    side: int
    dim: int
    places: Tensor  # (units, places of each)

    def features(self, calls: Mapping[str, Sequence[tuple[Tensor, Tensor]]]) -> Tensor:
        """Return what the units said, (samples, units), in float64."""
        rows = [call[self.side].movedim(self.dim, -1).flatten(0, -2) for call in calls[self.layer]]
        seen = torch.cat(rows)[:, self.places.to(rows[0].device)]
        return seen.movedim(2, 1).flatten(0, 1).double()


def _sites(model: nn.Module, structure: Structure) -> list[_Site]:
    sites = []
    for name, group in structure.groups.items():
        for part in group.slices:
            layer, _, leaf = part.name.rpartition(".")
            module = model.get_submodule(layer)
            if leaf != "weight" or part.dim > 1 or not isinstance(module, _ConvNd | nn.Linear):
                continue
            counts = part.owner.bincount(minlength=group.size)
            if bool((counts != counts[0]).any()):
                continue
            places = part.index[part.owner.argsort(stable=True)].view(group.size, -1)
            writes = (part.dim == 0) != (isinstance(module, _ConvNd) and module.transposed)
            dim = 1 if isinstance(module, _ConvNd) else -1
            sites.append(_Site(name, layer, int(writes), dim, places))
    return sites


@torch.no_grad()
def match_units(
    model: nn.Module, other: nn.Module, structure: Structure, batches: Iterable[Tensor]
) -> dict[str, Match]:
    r"""Pair the units of two networks so that the sum of their correlations is greatest.

    .. math:: \pi = \arg\max_\pi \sum_u \sum_l \mathrm{corr}\big(z^A_{l, u}, z^B_{l, \pi(u)}\big)

    over all layers l that read or write the group's units, samples and places. Of a unit with several channels, such as
    an attention head, these are compared in order.

    Args:
        model: a network; it stays as it is.
        other: another of its architecture; it stays as it is.
        structure: of `model`.
        batches: inputs (N, ...), without labels; generic pictures do where there are no others.

    Returns:
        The matches by name of group; where units were seen nowhere, in order and with correlation 0.
    """
    from scipy.optimize import linear_sum_assignment

    sites = _sites(model, structure)
    moments: dict[int, list[Any]] = {}
    for x in batches:
        ours, theirs = record_calls(model, x), record_calls(other, x)
        for number, site in enumerate(sites):
            if site.layer in ours:
                a, b = site.features(ours), site.features(theirs)
                new = (len(a), a.sum(0), b.sum(0), (a * a).sum(0), (b * b).sum(0), a.T @ b)
                moments[number] = [m + n for m, n in zip(moments.get(number, [0] * 6), new, strict=True)]
    totals = {name: torch.zeros(group.size, group.size) for name, group in structure.groups.items()}
    counts = dict.fromkeys(totals, 0)
    for number, (n, a, b, aa, bb, ab) in moments.items():
        variances = (aa / n - (a / n) ** 2).clamp(min=0)[:, None] * (bb / n - (b / n) ** 2).clamp(min=0)
        covariance = ab / n - torch.outer(a, b) / n**2
        correlation = torch.where(variances > 1e-16, covariance * variances.clamp(min=1e-16).rsqrt(), 0)
        totals[sites[number].group] += correlation.float().cpu()
        counts[sites[number].group] += 1
    matches = {}
    for name, total in totals.items():
        mean = total / max(1, counts[name])
        rows, columns = linear_sum_assignment(mean.numpy(), maximize=True)
        matches[name] = Match(torch.from_numpy(columns), mean[rows, columns])
    return matches


def lay_out(
    model: nn.Module,
    other: nn.Module,
    structure: Structure,
    matches: Mapping[str, Match],
    shared: Mapping[str, int],
    heads: Sequence[str] = (),
) -> dict[tuple[str, int], Axis]:
    """Give every unit of both networks its place: the best pairs share one, the rest stand side by side.

    Args:
        model: a network.
        other: another of its architecture, but for the outputs of `heads`.
        structure: of `model`.
        matches: by name of group.
        shared: how many pairs share a place, by name of group; a group that is not named shares all.
        heads: names of layers whose outputs stay apart, the first network's before the second's.

    Returns:
        The axes by name of parameter and dimension.

    Raises:
        ValueError: if units lie in an order in which others cannot stand beside them.
    """
    sizes = {name: tensor.shape for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    theirs = {name: tensor.shape for name, tensor in (*other.named_parameters(), *other.named_buffers())}
    lies: dict[tuple[str, int], list[tuple[str, Slice]]] = {}
    for name, group in structure.groups.items():
        for part in group.slices:
            lies.setdefault((part.name, part.dim), []).append((name, part))
    slots = {
        name: _slots(matches[name], shared.get(name, group.size)) for name, group in structure.groups.items()
    }
    axes = {key: _axis(key, sizes[key[0]][key[1]], parts, slots, matches) for key, parts in lies.items()}
    for name in (f"{head}.{leaf}" for head in heads for leaf in ("weight", "bias")):
        if name in sizes:
            first, second = torch.arange(sizes[name][0]), torch.arange(theirs[name][0])
            axes[name, 0] = Axis(
                torch.cat((first, torch.full_like(second, -1))),
                torch.cat((torch.full_like(first, -1), second)),
            )
    return axes


def _slots(match: Match, shared: int) -> list[tuple[int, int]]:
    """Return the units of both networks that stand at each new place, -1 for none."""
    best = torch.zeros(len(match.order), dtype=torch.bool)
    best[match.score.argsort(descending=True, stable=True)[:shared]] = True
    pairs = list(enumerate(match.order.tolist()))
    together = [pair for pair, is_best in zip(pairs, best.tolist(), strict=True) if is_best]
    apart = [pair for pair, is_best in zip(pairs, best.tolist(), strict=True) if not is_best]
    return [*together, *((a, -1) for a, _ in apart), *((-1, b) for b in sorted(b for _, b in apart))]


def _axis(
    key: tuple[str, int],
    size: int,
    parts: Sequence[tuple[str, Slice]],
    slots: Mapping[str, list[tuple[int, int]]],
    matches: Mapping[str, Match],
) -> Axis:
    owner: list[tuple[str, int]] = [("", 0)] * size
    for name, part in parts:
        for place, unit in zip(part.index.tolist(), part.owner.tolist(), strict=True):
            owner[place] = (name, unit)
    # A run holds each unit of one group once, in order; what is new stands at its end.
    runs: list[list[int]] = []
    for place in range(size):
        before = owner[place - 1] if place else ("", 0)
        if not runs or before[0] != owner[place][0] or before[1] > owner[place][1]:
            runs.append([])
        runs[-1].append(place)
    of_unit: dict[tuple[str, int], list[int]] = {}
    for place, who in enumerate(owner):
        of_unit.setdefault(who, []).append(place)
    first: list[int] = []
    second: list[int] = []
    for run in runs:
        name = owner[run[0]][0]
        if not name or len(slots[name]) == len(matches[name].order):
            first += run
            second += [_partner(place, owner[place], of_unit, matches) for place in run]
            continue
        here: dict[int, list[int]] = {-1: []}
        for place in run:
            here.setdefault(owner[place][1], []).append(place)
        if len(here) <= len(matches[name].order):
            raise ValueError(
                f"units of {name} do not stand in order along dimension {key[1]} of {key[0]}; share all of them"
            )
        for a, b in slots[name]:
            width = len(here[max(a, b)])
            first += here[a] or [-1] * width
            second += here[b] or [-1] * width
    return Axis(torch.tensor(first), torch.tensor(second))


def _partner(
    place: int, who: tuple[str, int], of_unit: Mapping[Any, list[int]], matches: Mapping[str, Match]
) -> int:
    if not who[0]:
        return place
    unit = int(matches[who[0]].order[who[1]])
    return of_unit[who[0], unit][of_unit[who].index(place)]


@torch.no_grad()
def merge_units(model: M, other: nn.Module, axes: Axes) -> M:
    r"""Return one network with every unit at its place; at shared places stands the mean of both.

    A unit that stands alone keeps its weights and reads shared units as if they were its own network's. With every unit
    alone the output is exactly the mean of both networks' outputs, or both outputs where these are apart.

    Args:
        model: a network; it stays as it is.
        other: another of its architecture; it stays as it is.
        axes: from `lay_out`.

    Raises:
        ValueError: if parameters that have no axis differ in shape.
    """
    merged = copy.deepcopy(model)
    theirs = dict([*other.named_parameters(), *other.named_buffers()])
    for name, tensor in dict([*merged.named_parameters(), *merged.named_buffers()]).items():
        if not tensor.is_floating_point():
            continue
        values = (tensor.detach(), theirs[name].detach())
        for dim in range(tensor.ndim):
            axis = axes.get((name, dim))
            if axis is not None:
                a, b = axis.shares
                values = axis.gather(values, dim, (a, b) if dim == 0 else ((a > 0).float(), (b > 0).float()))
            elif values[0].shape[dim] != values[1].shape[dim]:
                raise ValueError(
                    f"{name} is {tuple(tensor.shape)} in one network and {tuple(theirs[name].shape)} in the other; "
                    "if it is a classifier, name its layer in heads"
                )
        value = values[0] + values[1]
        value = value if (name, 0) in axes else value / 2
        owner, _, leaf = name.rpartition(".")
        module = merged.get_submodule(owner)
        if isinstance(tensor, nn.Parameter):
            setattr(module, leaf, nn.Parameter(value, requires_grad=tensor.requires_grad))
        else:
            module._buffers[leaf] = value
    for module in merged.modules():
        if isinstance(module, _ConvNd):
            if module.groups > 1:
                module.groups = (
                    module.groups
                    * module.weight.shape[0]
                    // (module.in_channels if module.transposed else module.out_channels)
                )
            sides = [module.weight.shape[0], module.weight.shape[1] * module.groups]
            module.in_channels, module.out_channels = sides if module.transposed else sides[::-1]
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, _BatchNorm) and module.running_mean is not None:
            module.num_features = len(module.running_mean)
    return merged
