"""PLeaS: two networks merged into one of any size in between, by permutations and least squares.

Paper: Nasery et al., PLeaS, https://arxiv.org/abs/2407.02447. Matching and placing of units: `matching`. How many
pairs of a group share a place is chosen as in the paper's code: the program is linear in what was measured and its one
constraint, the multiply-adds, is quadratic. Statistics of batch norms are measured anew and corrected by what the same
measurement is off for the two networks, so that two equal networks merge into themselves.
"""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from omniconv.compress.merge.matching import (
    Axes,
    Axis,
    Match,
    lay_out,
    match_units,
    merge_units,
    record_calls,
)
from omniconv.compress.report import CompressionReport, compare, weight_layers
from omniconv.compress.structure.graph import Structure, trace_structure
from omniconv.design.cost import layer_macs

__all__ = ["choose_shared", "fit_layers", "match_norms", "pleas", "sensitivities", "separable"]

M = TypeVar("M", bound=nn.Module)

_CHUNK = 2**24
_FITTED = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward, nn.Linear.forward)


def _patches(layer: nn.Module, x: Tensor) -> Tensor:
    """Return what each output of a layer reads, (samples, groups, numbers), with a one for the bias."""
    groups = 1
    if isinstance(layer, _ConvNd):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        for dim, (k, s, d) in enumerate(
            zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), start=2
        ):
            x = x.unfold(dim, d * (k - 1) + 1, s)[..., ::d]
        places = len(layer.kernel_size)
        x = x.movedim(1, 1 + places).flatten(0, places).flatten(1)
        groups = layer.groups
    x = x.flatten(0, -2).unflatten(1, (groups, -1))
    return x if layer.bias is None else F.pad(x, (0, 1), value=1.0)


def _mix(axis: Axis | None, values: tuple[Tensor, Tensor], dim: int) -> Tensor:
    a, b = values if axis is None else axis.gather(values, dim, axis.shares)
    return (a + b) / 2 if axis is None else a + b


class _Fit:
    """The normal equations of one merged layer."""

    def __init__(self, name: str, layer: nn.Conv2d | nn.Linear, axes: Axes) -> None:
        self.layer = layer
        self.write = axes.get((f"{name}.weight", 0))
        self.read = axes.get((f"{name}.weight", 1))
        self.dim = 1 if isinstance(layer, _ConvNd) else -1
        groups = layer.groups if isinstance(layer, _ConvNd) else 1
        if groups > 1 and self.write is not None:
            # Units are whole groups, so what is read follows what is written.
            read, written = layer.weight.shape[1], layer.weight.shape[0] // groups
            first, second = (
                torch.where(p < 0, -1, p // written)[::written, None]
                for p in (self.write.first, self.write.second)
            )
            inner = torch.arange(read)
            self.read = Axis(*(torch.where(p < 0, -1, p * read + inner).flatten() for p in (first, second)))
        rows = layer.weight.detach().flatten(1)
        if layer.bias is not None:
            rows = torch.cat((rows, layer.bias.detach()[:, None]), 1)
        self.rows = rows.unflatten(0, (groups, -1))  # (groups, outputs, numbers read)
        self.gram: Tensor | float = 0.0
        self.rest: Tensor | float = 0.0

    def add(self, ours: Sequence[tuple[Tensor, Tensor]], theirs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Count in what both networks' layers read and wrote."""
        for (xa, ya), (xb, yb) in zip(ours, theirs, strict=True):
            x, y = _mix(self.read, (xa, xb), self.dim), _mix(self.write, (ya, yb), self.dim)
            size = max(1, _CHUNK * len(x) // (y.numel() * self.rows.shape[2]))
            for some, wanted in zip(x.split(size), y.split(size), strict=True):
                inputs = _patches(self.layer, some).movedim(1, 0)
                outputs = wanted.movedim(self.dim, -1).flatten(0, -2).unflatten(1, (len(self.rows), -1))
                error = outputs.movedim(1, 0) - inputs @ self.rows.mT
                self.gram = self.gram + inputs.mT @ inputs
                self.rest = self.rest + inputs.mT @ error

    def solve(self, ridge: float) -> None:
        """Set the layer's weights; a unit of one network reads none of the other's alone."""
        if not isinstance(self.gram, Tensor) or not isinstance(self.rest, Tensor):
            return
        gram, rest = self.gram.double(), self.rest.double()
        diagonal = gram.diagonal(dim1=1, dim2=2)
        gram.diagonal(dim1=1, dim2=2).add_(ridge * diagonal.mean(1, keepdim=True).clamp(min=1e-12))
        change = torch.zeros_like(self.rows)
        for outputs, inputs in self._blocks():
            part = torch.linalg.solve(gram[:, inputs][:, :, inputs], rest[:, inputs][:, :, outputs])
            block = change[:, outputs]
            block[:, :, inputs] = part.mT.to(block)
            change[:, outputs] = block
        rows = (self.rows + change).flatten(0, 1)
        if self.layer.bias is not None:
            self.layer.bias.copy_(rows[:, -1])
            rows = rows[:, :-1]
        self.layer.weight.copy_(rows.view_as(self.layer.weight))

    def _blocks(self) -> list[tuple[Tensor, Tensor]]:
        """Return which outputs (of a group) are fitted to which inputs, as indices."""
        groups, outputs, inputs = self.rows.shape
        every = torch.arange(outputs), torch.arange(inputs)
        if groups > 1 or self.write is None or self.read is None:
            return [every]
        taps = self.layer.weight[0, 0].numel()
        both = (self.write.first >= 0) & (self.write.second >= 0)
        blocks = [(both, torch.ones(inputs, dtype=torch.bool))]
        for written, read in ((self.write.first, self.read.first), (self.write.second, self.read.second)):
            seen = torch.ones(inputs, dtype=torch.bool)
            seen[: len(read) * taps] = (read >= 0).repeat_interleave(taps)
            blocks.append((~both & (written >= 0), seen))
        return [(o.nonzero().flatten(), i.nonzero().flatten()) for o, i in blocks if o.any()]


@torch.no_grad()
def fit_layers(
    merged: nn.Module,
    model: nn.Module,
    other: nn.Module,
    axes: Axes,
    batches: Iterable[Tensor],
    *,
    ridge: float = 1e-3,
) -> None:
    r"""Fit every convolution and linear layer of a merged network, in place, to what the two networks' layers do.

    .. math:: W = \arg\min_W \big\lVert W \bar x - \bar y \big\rVert^2 + \lambda \lVert W - W_0 \rVert^2

    where :math:`\bar x` and :math:`\bar y` are what the layer reads and writes in the two networks, in their new places
    and averaged where a place is shared; :math:`W_0` are the weights that it has.

    Args:
        merged: from `merge_units`.
        model: the first network; it stays as it is.
        other: the second; it stays as it is.
        axes: by which they were merged.
        batches: inputs.
        ridge: :math:`\lambda` in units of the mean square of what a layer reads.
    """
    fits = {
        name: _Fit(name, layer, axes)  # pyright: ignore[reportArgumentType]
        for name, layer in weight_layers(merged).items()
        if type(layer).forward in _FITTED
    }
    for x in batches:
        ours, theirs = record_calls(model, x), record_calls(other, x)
        for name, fit in fits.items():
            if name in ours:
                fit.add(ours[name], theirs[name])
    for fit in fits.values():
        fit.solve(ridge)


@torch.no_grad()
def _measured_norms(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return means and variances that batch norms see, by name."""
    model = copy.deepcopy(model).eval()
    norms = _norms(model)
    for norm in norms.values():
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    for x in batches if norms else ():
        model(x)
    return {name: (norm.running_mean, norm.running_var) for name, norm in norms.items()}


def _norms(model: nn.Module) -> dict[str, Any]:
    """Return the batch norms that keep statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


@torch.no_grad()
def match_norms(
    merged: nn.Module, model: nn.Module, other: nn.Module, axes: Axes, batches: Iterable[Tensor]
) -> None:
    r"""Set the statistics of a merged network's batch norms, in place, to what they see.

    .. math:: \mu = \hat\mu + \tfrac12 \sum_{n \in A, B} (\mu_n - \hat\mu_n), \qquad
              \sigma^2 = \hat\sigma^2 \cdot \tfrac12 \sum_{n \in A, B} \sigma_n^2 / \hat\sigma_n^2

    where hats are measured on the batches and the others are those that the two networks have.

    Args:
        merged: from `merge_units`, fitted or not.
        model: the first network; it stays as it is.
        other: the second; it stays as it is.
        axes: by which they were merged.
        batches: inputs.
    """
    batches = list(batches)
    seen, ours, theirs = (_measured_norms(m, batches) for m in (merged, model, other))
    changed, first, second = (_norms(m) for m in (merged, model, other))
    for name, (mean, variance) in seen.items():
        axis = axes.get((f"{name}.running_mean", 0))
        a, b = (
            (norm.running_mean - m, norm.running_var / v.clamp(min=1e-12))
            for norm, (m, v) in ((first[name], ours[name]), (second[name], theirs[name]))
        )
        changed[name].running_mean.copy_(mean + _mix(axis, (a[0], b[0]), 0))
        changed[name].running_var.copy_(variance * _mix(axis, (a[1], b[1]), 0))


@torch.no_grad()
def separable(model: nn.Module, structure: Structure, x: Tensor) -> list[str]:
    """Return the groups of which units of two networks can stand side by side, tried out on `model` beside itself.

    These are groups of convolutions, linear layers and batch norms only: what is normalised over units, or compared
    between them, would change with the number of units.

    Args:
        model: stays as it is.
        structure: of `model`.
        x: an input.
    """
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, _BatchNorm)
    alike = {
        name: Match(torch.arange(group.size), torch.zeros(group.size))
        for name, group in structure.groups.items()
    }
    model = copy.deepcopy(model).eval()
    wanted = model(x)

    def works(names: Sequence[str]) -> bool:
        try:
            axes = lay_out(model, model, structure, alike, dict.fromkeys(names, 0))
            got = merge_units(model, model, axes)(x)
        except Exception:  # whatever a forward pass may raise on sizes that it does not expect
            return False
        return got.shape == wanted.shape and torch.allclose(
            got, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max())
        )

    names = [
        name
        for name, group in structure.groups.items()
        if all(isinstance(model.get_submodule(p.name.rpartition(".")[0]), kinds) for p in group.slices)
    ]
    return names if works(names) else [name for name in names if works([name])]


@torch.no_grad()
def sensitivities(
    model: nn.Module,
    other: nn.Module,
    structure: Structure,
    matches: Mapping[str, Match],
    names: Sequence[str],
    x: Tensor,
    heads: Sequence[str] = (),
) -> dict[str, float]:
    """Return the mean square by which outputs change when the pairs of one group alone share their places.

    Args:
        model: the first network; it stays as it is.
        other: the second; it stays as it is.
        structure: of `model`.
        matches: from `match_units`.
        names: groups to measure; of the others all pairs share.
        x: inputs.
        heads: see `lay_out`.
    """

    def run(shared: Mapping[str, int]) -> Tensor:
        axes = lay_out(model, other, structure, matches, shared, heads)
        return merge_units(model, other, axes).eval()(x)

    apart = dict.fromkeys(names, 0)
    wanted = run(apart)
    changed = {name: run(apart | {name: structure.groups[name].size}) for name in names}
    return {name: float((y - wanted).square().mean()) for name, y in changed.items()}


def choose_shared(
    model: nn.Module,
    structure: Structure,
    gains: Mapping[str, float],
    budget: float,
    heads: Sequence[str] = (),
) -> dict[str, int]:
    r"""Return how many pairs of each group share a place, by a quadratic program.

    .. math:: \max_{0 \le r \le 1} \sum_g s_g r_g \quad \text{with} \quad
              \sum_l m_l \big[(1 + r_i)(1 + r_o) - 2 r_i r_o\big] \le \text{budget} \cdot \sum_l m_l

    where r is the share of units that stand alone, :math:`m_l` the multiply-adds of a layer that reads group i and
    writes group o. Units of one network read none of the other's alone; these zeros do not count.

    Args:
        model: one of the networks.
        structure: of it.
        gains: :math:`s_g`, see `sensitivities`; of groups that are not named all pairs share.
        budget: multiply-adds, in units of those of the network in which all share, from 1 to 2.
        heads: see `lay_out`; in both counts these stay apart.
    """
    from scipy.optimize import minimize

    names = list(gains)
    scale = max(max(gains.values(), default=1.0), 1e-30)
    weights = np.array([max(gains[name] / scale, 1e-5) for name in names])
    terms = _terms(model, structure, names, heads)
    count = len(names)

    def macs(r: np.ndarray) -> float:
        r = np.concatenate((r, (0.0, 1.0)))  # what is always shared, and what never is
        return sum(
            m * ((1 + r[i]) * (1 + r[o]) - 2 * r[i] * r[o]) if i != o else m * (1 + r[i]) for m, i, o in terms
        )

    least = macs(np.zeros(count))

    def left(r: np.ndarray) -> float:
        return budget - macs(r) / least

    low, high = 0.0, 1.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if left(np.full(count, middle)) >= 0 else (low, middle)
    start = np.full(count, low)
    found = minimize(
        lambda r: -weights @ r,
        start,
        jac=lambda r: -weights,
        bounds=[(0.0, 1.0)] * count,
        constraints={"type": "ineq", "fun": left},
        method="SLSQP",
    )
    alone = (
        found.x
        if found.success and left(found.x) >= -1e-6 and weights @ found.x >= weights @ start
        else start
    )
    sizes = [structure.groups[name].size for name in names]
    return {
        name: size - math.floor(size * min(1.0, max(0.0, r)) + 1e-3)
        for name, size, r in zip(names, sizes, alone, strict=True)
    }


def _terms(
    model: nn.Module, structure: Structure, names: Sequence[str], heads: Sequence[str]
) -> list[tuple[float, int, int]]:
    """Return multiply-adds by the group that is read and the one that is written; see `choose_shared`."""
    layers = weight_layers(model)
    macs = layer_macs(model, structure.input_shape)
    shares: dict[tuple[str, int], dict[int, float]] = {}
    for number, name in enumerate(names):
        for part in structure.groups[name].slices:
            layer, _, leaf = part.name.rpartition(".")
            if leaf == "weight" and layer in layers:
                side = shares.setdefault((layer, part.dim), {})
                side[number] = len(part.index) / layers[layer].weight.shape[part.dim]
    always, never = len(names), len(names) + 1
    terms = []
    for name, layer in layers.items():
        reads, writes = ({**shares.get((name, dim), {})} for dim in (1, 0))
        for side in (reads, writes):
            side[always] = 1 - sum(side.values())
        if name in heads:
            writes = {never: 1.0}
        for o, written in writes.items():
            if isinstance(layer, _ConvNd) and layer.groups > 1:
                terms.append((macs.get(name, 0) * written, o, o))
            else:
                terms += [(macs.get(name, 0) * read * written, i, o) for i, read in reads.items()]
    return terms


def pleas(
    model: M,
    other: nn.Module,
    batches: Iterable[Tensor],
    input_shape: tuple[int, ...],
    budget: float = 1.0,
    *,
    heads: Sequence[str] = (),
    structure: Structure | None = None,
) -> tuple[M, CompressionReport]:
    """Merge two networks of one architecture, trained apart (`PLeaS <https://arxiv.org/abs/2407.02447>`_).

    Units are matched by their activations; the best pairs become one unit, the others stand side by side, and every
    layer's weights are fitted by least squares. The paper finds generic pictures good enough where those that the
    networks were trained on are not at hand.

    Args:
        model: a network; it stays as it is.
        other: another of its architecture; it stays as it is.
        batches: inputs (N, ...), some hundreds in all, without labels.
        input_shape: of one sample, for example (3, 224, 224); see `trace_structure`.
        budget: multiply-adds in units of one network's, zeros not counted: 1 for its size, 2 for both side by side.
        heads: names of the classifiers if what the networks tell apart differs: the output is then that of `model`
            followed by that of `other`. Otherwise it is as the mean of both.
        structure: of `model`, if it is known already.

    Returns:
        The merged network, a plain module, and the report.

    Raises:
        ValueError: if `budget` lies outside [1, 2], there are no batches, or the networks differ in more than `heads`.
    """
    batches = list(batches)
    if not 1 <= budget <= 2:
        raise ValueError(f"budget must lie in [1, 2]: got {budget}")
    if not batches:
        raise ValueError("batches must hold inputs: got none")
    structure = structure or trace_structure(model, input_shape)
    matches = match_units(model, other, structure, batches)
    shared: dict[str, int] = {}
    notes = ["The size before is that of one of the two networks."]
    if structure.fixed:
        notes.append(f"Averaged as they stand, as their units cannot be moved: {', '.join(structure.fixed)}.")
    if budget > 1:
        names = separable(model, structure, batches[0])
        gains = sensitivities(model, other, structure, matches, names, batches[0], heads)
        shared = choose_shared(model, structure, gains, budget, heads)
        notes.append(f"Pairs that share a place: {', '.join(f'{n} {k}' for n, k in shared.items())}.")
        notes.append(
            "A unit of one network reads none of the other's alone; dense kernels compute these zeros."
        )
        whole = [name for name in structure.groups if name not in shared]
        if whole:
            notes.append(f"All pairs share in {', '.join(whole)}.")
    axes = lay_out(model, other, structure, matches, shared, heads)
    merged = merge_units(model, other, axes)
    fit_layers(merged, model, other, axes, batches)
    match_norms(merged, model, other, axes, batches)
    return merged, compare("PLeaS", model, merged, input_shape=input_shape, notes=tuple(notes))
