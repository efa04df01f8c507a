"""The structure graph: groups of channels that can be removed from a network, and the network without them.

Anchor: Fang et al., DepGraph: Towards Any Structural Pruning, https://arxiv.org/abs/2301.12900, which gives every kind
of layer its rule. Here elements are followed through one forward pass instead (see `trace`).
"""

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from omniconv.compress.structure.labels import FIXED, thin
from omniconv.compress.structure.sizes import mend_sizes
from omniconv.compress.structure.trace import Cut, Product, Trace, View
from omniconv.models.backbone import Backbone

__all__ = ["Group", "Slice", "Structure", "trace_structure"]

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Slice:
    """Where the units of a group lie in one parameter or buffer.

    Attributes:
        name: of the parameter or buffer.
        dim: dimension of it.
        index: places along `dim` that belong to units.
        owner: for each of them the number of its unit.
    """

    name: str
    dim: int
    index: Tensor
    owner: Tensor


@dataclass(frozen=True)
class Group:
    """Units that lie in the same parameters: each can be removed, alone or with others, but not its parts.

    Attributes:
        name: of the first layer that makes them.
        size: units.
        slices: where they lie.
    """

    name: str
    size: int
    slices: tuple[Slice, ...]


class Structure:
    """What can be removed from a model; made by `trace_structure`.

    Attributes:
        groups: by name.
        fixed: name of a group that was found but cannot be removed -> why.
    """

    def __init__(self, model: nn.Module, input_shape: tuple[int, ...], found: "_Found") -> None:
        self.groups = {group.name: group for group in found.groups}
        self.fixed: dict[str, str] = {}
        self.input_shape = input_shape
        self._found = found
        self._hold_what_fails(model)

    def scores(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return for each group the sum of `values` over every unit's slices, (units,).

        Args:
            values: a tensor of the parameter's shape by name of parameter; those without count nothing.
        """
        scores = {}
        for name, group in self.groups.items():
            total = torch.zeros(group.size)
            for part in group.slices:
                if part.name in values:
                    value = values[part.name].detach().float().cpu()
                    rows = value.movedim(part.dim, 0).reshape(value.shape[part.dim], -1).sum(1)
                    total.index_add_(0, part.owner, rows[part.index])
            scores[name] = total
        return scores

    def remove(self, model: M, keep: Mapping[str, Tensor]) -> M:
        """Return a copy of `model` without the units that are not kept, a plain module with smaller layers.

        Args:
            model: the traced model, or one of the same architecture with other weights; it stays as it is.
            keep: boolean tensor (units,) by name of group; of other groups everything is kept.

        Raises:
            ValueError: if a group is unknown, its mask has another length, or nothing of it would be left.
        """
        self._check(keep)
        smaller = copy.deepcopy(model)
        self._apply(smaller, keep)
        return smaller

    def mask(self, model: M, keep: Mapping[str, Tensor]) -> M:
        """Return a copy of `model` in which the slices of units that are not kept are zero, sizes as before."""
        self._check(keep)
        masked = copy.deepcopy(model)
        tensors = dict([*masked.named_parameters(), *masked.named_buffers()])
        with torch.no_grad():
            for name, dims in self._kept(keep).items():
                for dim, kept in dims.items():
                    tensors[name].index_fill_(dim, (~kept).nonzero().flatten(), 0)
        return masked

    def parameters(self, keep: Mapping[str, Tensor]) -> int:
        """Return how many parameters `remove` would leave."""
        self._check(keep)
        kept = self._kept(keep)
        return sum(
            math.prod(int(kept.get(name, {}).get(d, torch.ones(size)).sum()) for d, size in enumerate(shape))
            for name, shape in self._found.shapes.items()
            if name in self._found.learned
        )

    def macs(self, keep: Mapping[str, Tensor]) -> int:
        """Return how many multiply-adds for one sample `remove` would leave."""
        self._check(keep)
        alive = self._found.alive(keep)
        return sum(
            math.prod(_sizes(p.labels, alive)) * _sizes(p.inner, alive)[0] * p.times
            for p in self._found.products
        )

    def _check(self, keep: Mapping[str, Tensor]) -> None:
        for name, mask in keep.items():
            if name not in self.groups:
                raise ValueError(f"keep: no group {name!r}; there are {', '.join(self.groups)}")
            if mask.dtype != torch.bool or mask.shape != (self.groups[name].size,):
                raise ValueError(
                    f"keep[{name!r}] must be {self.groups[name].size} booleans: got {tuple(mask.shape)}"
                )
            if not bool(mask.any()):
                raise ValueError(f"keep[{name!r}] leaves nothing: keep at least one unit")

    def _kept(self, keep: Mapping[str, Tensor]) -> dict[str, dict[int, Tensor]]:
        """Return by parameter and dimension which indices are left."""
        kept: dict[str, dict[int, Tensor]] = {}
        for name, mask in keep.items():
            if bool(mask.all()):
                continue
            for part in self.groups[name].slices:
                size = self._found.shapes[part.name][part.dim]
                left = kept.setdefault(part.name, {}).setdefault(part.dim, torch.ones(size, dtype=torch.bool))
                left[part.index[~mask[part.owner]]] = False
        return kept

    def _apply(self, model: nn.Module, keep: Mapping[str, Tensor]) -> None:
        kept = self._kept(keep)
        tensors = dict([*model.named_parameters(), *model.named_buffers()])
        own: dict[str, dict[int, set[int]]] = {}
        changes: dict[str, dict[int, set[int]]] = {}
        for name, dims in kept.items():
            module, _, leaf = name.rpartition(".")
            owner, tensor = model.get_submodule(module), tensors[name]
            value = tensor.detach()
            for dim, left in dims.items():
                value = value.index_select(dim, left.nonzero().flatten().to(value.device))
                _note(own, module, left.numel(), int(left.sum()))
                _note(changes, module.rpartition(".")[0], left.numel(), int(left.sum()))
            if isinstance(tensor, nn.Parameter):
                setattr(owner, leaf, nn.Parameter(value.clone(), requires_grad=tensor.requires_grad))
            else:
                owner._buffers[leaf] = value.clone()
        alive = self._found.alive(keep)
        for view in self._found.views:
            for old, new in zip(view.labels.shape, _sizes(view.labels, alive), strict=True):
                _note(changes, view.module, old, new)
        self._describe_features(model, alive)
        mend_sizes(model, kept, (own, changes), self._cuts(alive), self._found.shapes)

    def _describe_features(self, model: nn.Module, alive: np.ndarray) -> None:
        """Let a backbone's `feature_info` say how many channels its maps have now."""
        if not isinstance(model, Backbone):
            return
        last = model.feature_info[-1]["num_chs"]
        for feature in model.feature_info:
            labels = self._found.outputs.get(feature["module"])
            if labels is not None and feature["num_chs"] in labels.shape:
                feature["num_chs"] = _sizes(labels, alive)[labels.shape.index(feature["num_chs"])]
        if model.num_features == last:
            model.num_features = model.feature_info[-1]["num_chs"]

    def _cuts(self, alive: np.ndarray) -> dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]]:
        cuts: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
        for cut in self._found.cuts:
            before = np.concatenate(([0], np.cumsum(alive[cut.labels.clamp(min=0).numpy()])))
            cuts.setdefault(cut.module, []).append((cut.places, tuple(int(before[p]) for p in cut.places)))
        return cuts

    def _hold_what_fails(self, model: nn.Module) -> None:
        """Try to halve every group without weights; hold those after which the model does not run."""
        with torch.device("meta"):
            shadow = copy.deepcopy(model).to("meta").eval()
            x = torch.empty(1, *self.input_shape, dtype=_kind(model))
            wanted = _shapes(shadow(x))

        def fault(names: list[str]) -> str:
            keep = {name: torch.arange(self.groups[name].size) % 2 == 0 for name in names}
            try:
                with torch.no_grad():
                    got = _shapes(self.remove(shadow, keep)(x))
            except Exception as error:  # whatever a forward pass may raise on sizes that it does not expect
                return str(error).splitlines()[0] if str(error) else type(error).__name__
            return "" if got == wanted else "the answer's shape changes"

        def admit(running: list[str], names: list[str]) -> list[str]:
            """Return `running`, which runs, and those of `names` with which it still does."""
            problem = fault([*running, *names]) if names else ""
            if not problem:
                return [*running, *names]
            if len(names) == 1:
                self.fixed[names[0]] = problem
                del self.groups[names[0]]
                return running
            half = len(names) // 2
            return admit(admit(running, names[:half]), names[half:])

        admit([], list(self.groups))


def _kind(model: nn.Module) -> torch.dtype:
    floats = (p.dtype for p in model.parameters() if p.is_floating_point())
    return next(floats, torch.get_default_dtype())


def _note(changes: dict[str, dict[int, set[int]]], module: str, old: int, new: int) -> None:
    changes.setdefault(module, {}).setdefault(old, set()).add(new)


def _shapes(output: Any) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for t in tree_flatten(output)[0] if isinstance(t, Tensor)]


def _sizes(labels: Tensor, alive: np.ndarray) -> list[int]:
    """Return the sizes that a tensor with these labels has when only some units live."""
    if not labels.numel():
        return list(labels.shape)
    spread = [d for d in range(labels.ndim) if not labels.stride(d)]
    labels, shape = thin(labels, spread), labels.shape
    units = labels > 0
    lives = units & torch.from_numpy(alive)[labels.clamp(min=0)]

    def left(dim: int, size: int) -> int:
        # Zeros of a padding stay where nothing else is, and go with the units that they lie beside.
        lives_there, units_there = (t.movedim(dim, 0).reshape(size, -1).any(1) for t in (lives, units))
        return int((lives_there | ~units_there).sum())

    return [size if d in spread else left(d, size) for d, size in enumerate(shape)]


@dataclass
class _Found:
    """What a trace says, worked out: groups, shapes of parameters, and how to learn new sizes.

    Attributes:
        groups: that may be removed.
        shapes: of parameters and buffers.
        learned: names of the parameters.
        roots: label -> the label that stands for all tied to it.
        units: name of group -> root of each of its units.
        views, cuts, products, outputs: see `Trace`.
    """

    groups: tuple[Group, ...]
    shapes: dict[str, tuple[int, ...]]
    learned: set[str]
    roots: np.ndarray
    units: dict[str, np.ndarray]
    views: list[View]
    cuts: list[Cut]
    products: list[Product]
    outputs: dict[str, Tensor]

    def alive(self, keep: Mapping[str, Tensor]) -> np.ndarray:
        """Return for each label whether its unit is left."""
        dead = np.zeros(len(self.roots), dtype=bool)
        for name, mask in keep.items():
            dead[self.units[name][~mask.numpy()]] = True
        return ~dead[self.roots]


def trace_structure(model: nn.Module, input_shape: tuple[int, ...]) -> Structure:
    r"""Find which channels of a model belong together, whatever it is made of.

    Every element is followed through one forward pass on the meta device: what meets in a sum, a product or a
    normalisation goes together, and so does what a grouped convolution or an attention head shares. The channels of
    images and answers are fixed. Whether the model runs without half of each group is tried (without weights).

    Args:
        model: any module that runs on the meta device with a batch of one; it stays as it is.
        input_shape: of one sample, for example (3, 224, 224), not square and large enough that the deepest map has
            more than one pixel.

    Raises:
        ValueError: if the model does not run on such an input.
    """
    with torch.device("meta"):
        shadow = copy.deepcopy(model).to("meta").eval()
        x = torch.empty(1, *input_shape, dtype=_kind(model))
    shapes = {name: tuple(t.shape) for name, t in (*shadow.named_parameters(), *shadow.named_buffers())}
    try:
        with torch.no_grad(), Trace(shadow, x) as trace:
            output = shadow(x)
        trace.fix(output)
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(f"the model does not run on an input of {input_shape}: {error}") from error
    learned = {name for name, _ in shadow.named_parameters()}
    return Structure(model, input_shape, _work_out(trace, shapes, learned))


def _work_out(trace: Trace, shapes: dict[str, tuple[int, ...]], learned: set[str]) -> _Found:
    """Decide which dimension of which parameter belongs to which units."""
    ties = trace.ties
    pairs = [np.zeros((2, 0), dtype=np.int64), *(p.numpy() for p in ties.pairs)]
    starts = np.array(list(trace.starts.values()), dtype=np.int64)
    names = list(trace.starts)
    slots: dict[tuple[str, int], np.ndarray] = {}
    count = ties.units + 1

    def slot(name: str, dim: int) -> np.ndarray:
        nonlocal count
        if (name, dim) not in slots:
            size = shapes[name][dim]
            slots[name, dim] = np.arange(count, count + size)
            count += size
        return slots[name, dim]

    def roots() -> np.ndarray:
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import connected_components

        a, b = np.concatenate(pairs, axis=1)
        links = coo_matrix((np.ones(len(a), dtype=bool), (a, b)), shape=(count, count))
        return connected_components(links, directed=False)[1]

    def parts(codes: np.ndarray, *others: np.ndarray) -> Iterator[tuple[Any, ...]]:
        """Yield for each parameter its name, the elements in it, and what else stands beside them."""
        owner = np.searchsorted(starts, codes, side="right") - 1
        for o in np.unique(owner):
            yield names[o], codes[owner == o] - starts[o], *(other[owner == o] for other in others)

    def own(name: str, dim: int, at: np.ndarray) -> np.ndarray:
        return slot(name, dim)[np.unravel_index(at, shapes[name])[dim]]

    uses = [use for codes, labels in ties.uses for use in parts(-codes.numpy(), labels.numpy())]
    shared = [
        _unique_pairs(*(t.numpy()[((a > 0) & (b > 0)).numpy()] for t in (a, b))) for a, b in ties.shared
    ]
    for _ in range(2):
        # Ties learned in the first round may make labels equal that looked different.
        standing = roots()
        for few, many in shared:
            alone = _one_unit_each(few, standing[many])
            pairs.append(np.stack((few[alone], many[alone])))
        for name, at, labels in uses:
            alone = _one_unit_each(at, standing[labels])
            at, labels = at[alone], labels[alone]
            if not len(at):
                continue
            dim = _dimension(at, standing[labels], shapes[name])
            pairs.append(
                np.stack((own(name, dim, at) if dim is not None else np.full_like(labels, FIXED), labels))
            )
    for follows in ties.follows:
        small, first, last = (-codes.numpy() for codes in follows)
        for big, one, other, few in parts(first, last, small):
            # A parameter that scales rows of another one goes with the units of these rows.
            other = other - starts[names.index(big)]
            for dim in [
                d
                for n, d in slots
                if n == big and (other >= 0).all() and (other < math.prod(shapes[n])).all()
            ]:
                rows, check = own(big, dim, one), own(big, dim, other)
                if bool((rows == check).all()) and len(np.unique(rows)) > 1:
                    for name, at, labels in parts(few, rows):
                        along = _dimension(at, labels, shapes[name])
                        if along is not None:
                            pairs.append(np.stack((own(name, along, at), labels)))
    standing = roots()
    units, groups = _collect(slots, standing)
    return _Found(
        groups, shapes, learned, standing, units, trace.views, trace.cuts, trace.products, trace.outputs
    )


def _unique_pairs(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    few, many = np.unique(np.stack((a, b)), axis=1)
    return few, many


def _one_unit_each(at: np.ndarray, roots: np.ndarray) -> np.ndarray:
    """Return where an element belongs to one unit only; one that several share stays when one of them goes."""
    if not len(at):
        return np.zeros(0, dtype=bool)
    _, element = np.unique(at, return_inverse=True)
    low, high = np.full(element.max() + 1, np.iinfo(np.int64).max), np.full(element.max() + 1, -1)
    np.minimum.at(low, element, roots)
    np.maximum.at(high, element, roots)
    return (low == high)[element]


def _dimension(at: np.ndarray, roots: np.ndarray, shape: tuple[int, ...]) -> int | None:
    """Return the dimension along which the units lie: each index of it has one unit only, and units differ most."""
    best, most = None, (False, 0)
    for dim, index in enumerate(np.unravel_index(at, shape) if shape else ()):
        low = np.full(shape[dim], np.iinfo(np.int64).max)
        high = np.full(shape[dim], -1)
        np.minimum.at(low, index, roots)
        np.maximum.at(high, index, roots)
        seen = high >= 0
        # Where all is one unit, as what reads an image, the elements given stand along the dimension they fill.
        fills = bool(seen.all()), int(seen.sum())
        if bool((low[seen] == high[seen]).all()) and fills > most:
            best, most = dim, fills
    return best


def _collect(
    slots: dict[tuple[str, int], np.ndarray], roots: np.ndarray
) -> tuple[dict[str, np.ndarray], tuple[Group, ...]]:
    """Return the groups: units that lie in the same dimensions of the same parameters."""
    places = list(slots)
    own = [roots[labels] for labels in slots.values()]
    lies: dict[int, list[int]] = {}
    for row, found in enumerate(own):
        for root in np.unique(found).tolist():
            lies.setdefault(root, []).append(row)
    lies.pop(int(roots[FIXED]), None)
    alike: dict[tuple[int, ...], list[int]] = {}
    for root, rows in lies.items():
        alike.setdefault(tuple(rows), []).append(root)
    groups, units = [], {}
    for rows, members in alike.items():
        if len(members) == 1:
            continue
        makers = [places[row][0] for row in rows if places[row][1] == 0 and places[row][0].endswith("weight")]
        name = (makers or [places[rows[0]][0]])[0].removesuffix(".weight")
        while name in units:
            name += "'"
        first = own[rows[0]].tolist()
        order = np.array(sorted(members, key=first.index))
        number = np.full(len(roots), -1)
        number[order] = np.arange(len(order))
        slices = []
        for row in rows:
            owner = number[own[row]]
            index = np.flatnonzero(owner >= 0)
            slices.append(Slice(*places[row], torch.from_numpy(index), torch.from_numpy(owner[index])))
        units[name] = order
        groups.append(Group(name, len(order), tuple(slices)))
    return units, tuple(groups)
