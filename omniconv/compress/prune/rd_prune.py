"""Rate-distortion pruning: layer ratios that disturb the network's output least, by dynamic programming.

Paper: Xu et al., Efficient Joint Optimization of Layer-Adaptive Weight Pruning in Deep Neural Networks,
https://arxiv.org/abs/2308.10438. One-shot: `rd_prune`. Iterative: call it again on what it returned, with a
higher sparsity, and train between under `hold_masks`; what is pruned stays so. Without data: give it random
inputs.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from omniconv.compress.prune.global_magnitude import magnitudes
from omniconv.compress.prune.masks import apply_masks, prunable_weights, prune_count
from omniconv.compress.prune.ratios import keep_counts
from omniconv.compress.report import CompressionReport

__all__ = ["allocate", "distortion_curves", "rd_masks", "rd_prune"]

M = TypeVar("M", bound=nn.Module)


class _Replay:
    """Lets layers before one of interest return what they returned for the same input before.

    Only layers that run once in a pass and share their weight with no other module take part.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.model = model
        owners: dict[int, int] = {}
        for module in model.modules():
            for parameter in module._parameters.values():
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
        modules = {name: model.get_submodule(name) for name in names}
        self._modules = {n: m for n, m in modules.items() if owners[id(m.get_parameter("weight"))] == 1}
        self._outputs: dict[str, list[Tensor]] = {}

    def record(self, x: Tensor) -> Tensor:
        """Run the model, and keep what its layers return, in the order of their calls."""
        self._outputs = {}
        hooks = [
            module.register_forward_hook(lambda _module, _inputs, output, name=name: self._keep(name, output))
            for name, module in self._modules.items()
        ]
        try:
            return self.model(x)
        finally:
            for hook in hooks:
                hook.remove()

    def _keep(self, name: str, output: Any) -> None:
        # A copy, as what follows may work in place.
        self._outputs.setdefault(name, []).append(output.clone())

    def run(self, x: Tensor, changed: str) -> Tensor:
        """Run the model after the weight of `changed` alone was changed since `record`."""
        order = list(self._outputs)
        before = order[: order.index(changed)] if changed in order else []
        replayed = [name for name in before if len(self._outputs[name]) == 1]
        for name in replayed:
            self._modules[name].forward = lambda *_, name=name, **__: self._outputs[name][0].clone()
        try:
            return self.model(x)
        finally:
            for name in replayed:
                del self._modules[name].forward


@torch.no_grad()
def distortion_curves(
    model: nn.Module,
    x: Tensor,
    kept: Mapping[str, Sequence[int]],
    *,
    worst_case: bool = True,
    batch: int = 64,
) -> dict[str, np.ndarray]:
    r"""Return how far the output moves when one layer alone keeps only its largest weights.

    .. math:: \delta_i(k) = \mathrm{E}_x \| f(x; W) - f(x; W_1, \dots, W_i^{(k)}, \dots, W_l) \|^2

    with the k largest weights of layer i, averaged over the entries of the output.

    Args:
        model: stays as it is, and runs in eval mode.
        x: calibration inputs (N, ...).
        kept: by layer, the numbers of weights to measure at.
        worst_case: the maximum over the samples instead of the mean.
        batch: inputs in memory at a time, with what the layers make of them.

    Returns:
        By layer, one distortion for each number.

    Raises:
        ValueError: if the model returns no tensor.
    """
    shadow = copy.deepcopy(model).eval()
    weights = prunable_weights(shadow, list(kept))
    # The rank of each weight in its layer, the largest having 0.
    ranks = {name: _ranks(magnitude) for name, magnitude in magnitudes(shadow, list(kept)).items()}
    replay = _Replay(shadow, list(kept))
    reduce: Callable[[np.ndarray, np.ndarray], np.ndarray] = np.maximum if worst_case else np.add
    curves = {name: np.zeros(len(counts)) for name, counts in kept.items()}
    for part in x.split(batch):
        reference = replay.record(part)
        if not isinstance(reference, Tensor):
            raise ValueError(f"the model must return a tensor: got {type(reference).__name__}")
        for name, counts in kept.items():
            weight, whole = weights[name], weights[name].clone()
            found = []
            for count in counts:
                weight.copy_(whole * (ranks[name] < count))
                errors = (replay.run(part, name) - reference).flatten(1).double().square().mean(1)
                found.append(float(errors.max() if worst_case else errors.sum() / len(x)))
            weight.copy_(whole)
            curves[name] = reduce(curves[name], np.array(found))
    return curves


def _ranks(magnitude: Tensor) -> Tensor:
    # As `smallest` does, of equal weights the later counts as the larger.
    order = magnitude.reshape(-1).sort(stable=True).indices.flip(0)
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(order), device=order.device)
    return ranks.reshape(magnitude.shape)


def allocate(
    kept: Sequence[Sequence[int]], distortion: Sequence[Sequence[float]], budget: int, *, steps: int = 10_000
) -> list[int]:
    r"""Choose one level a layer so that the sum of distortions is least, by dynamic programming.

    .. math:: g_i(b) = \min_k \, \delta_i(k) + g_{i-1}(b - n_i(k))

    for each budget b, so the time is proportional to layers, budget levels and ratio levels.

    Args:
        kept: by layer and level, the weights n that stay.
        distortion: by layer and level.
        budget: weights that may stay in all.
        steps: levels of the budget. A budget no larger is exact; in a larger one weights are counted in whole
            steps, rounded up.

    Returns:
        The level of each layer.

    Raises:
        ValueError: if even the smallest levels exceed the budget.
    """
    step = max(1, math.ceil(budget / steps))
    size = budget // step + 1
    best = np.zeros(size)
    choices = []
    for counts, costs in zip(kept, distortion, strict=True):
        options = np.full((len(counts), size), np.inf)
        for option, count, cost in zip(options, counts, costs, strict=True):
            used = math.ceil(count / step)
            if used < size:
                option[used:] = cost + best[: size - used]
        # Of equal ones the last, which keeps least: what is over is of more use elsewhere.
        choices.append(len(counts) - 1 - options[::-1].argmin(0).astype(np.int16))
        best = options.min(0)
    if not np.isfinite(best[-1]):
        least = sum(map(min, kept))
        raise ValueError(f"the levels keep at least {least} weights of a budget of {budget}; add lower ones")
    left = size - 1
    levels: list[int] = []
    for counts, choice in zip(reversed(kept), reversed(choices), strict=True):
        levels.append(int(choice[left]))
        left -= math.ceil(counts[levels[-1]] / step)
    return levels[::-1]


def rd_masks(
    model: nn.Module,
    sparsity: float,
    x: Tensor,
    *,
    grid: int = 20,
    worst_case: bool = True,
    layers: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """Return the masks of `rd_prune`; arguments as there."""
    scores = magnitudes(model, layers)
    # Weights that were pruned before stay so: a level is a share of what is left.
    left = {name: int(score.count_nonzero()) for name, score in scores.items()}
    total = sum(score.numel() for score in scores.values())
    budget = min(total - prune_count(sparsity, total), sum(left.values()))
    if grid < 2:
        raise ValueError(f"grid must be at least 2: got {grid}")
    lowest = max(1, budget) / max(1, sum(left.values())) / 8
    shares = [lowest ** (level / (grid - 1)) for level in range(grid)]
    kept = {name: [math.floor(share * count) for share in shares] for name, count in left.items()}
    curves = distortion_curves(model, x, kept, worst_case=worst_case)
    chosen = allocate(list(kept.values()), [curves[name].tolist() for name in kept], budget)
    counts = {}
    gains = {}
    for (name, options), level in zip(kept.items(), chosen, strict=True):
        counts[name] = options[level]
        higher = max(0, level - 1)
        fall = curves[name][level] - curves[name][higher]
        gains[name] = fall / max(1, options[higher] - options[level])
    slack = budget - sum(counts.values())
    # What the grid leaves over goes where a weight helps most, so that the sparsity is exact.
    for name in sorted(counts, key=gains.__getitem__, reverse=True):
        more = min(slack, left[name] - counts[name])
        counts[name] += more
        slack -= more
    return keep_counts(scores, counts)


def rd_prune(
    model: M,
    sparsity: float,
    x: Tensor,
    *,
    grid: int = 20,
    worst_case: bool = True,
    layers: Sequence[str] | None = None,
    input_shape: tuple[int, ...] | None = None,
) -> tuple[M, CompressionReport]:
    r"""Zero each layer's smallest weights, as many as disturb the output least (`RD <https://arxiv.org/abs/2308.10438>`_).

    .. math:: \min_{k_1 \dots k_l} \sum_i \delta_i(k_i) \quad \text{such that} \quad
       \sum_i n_i(k_i) \le (1 - s) \sum_i n_i

    As distortions of single layers about add up to that of all together, each layer's curve is measured alone
    (`distortion_curves`) and the best sum is found exactly (`allocate`).

    Args:
        model: any module that returns a tensor; it stays as it is. On a pruned one no weight returns.
        sparsity: share of the prunable weights to zero, in [0, 1): `round(sparsity * count)` of them exactly.
        x: calibration inputs (N, ...), some hundred; random ones where there is no data.
        grid: numbers of weights at which each layer is measured, from all to an eighth of the average share,
            equally far apart on a logarithmic scale. Measuring takes layers * grid * N / 2 passes.
        worst_case: measure the sample that suffers most, as the authors do in their experiments, not the mean.
        layers: names of the layers to prune; all by default.
        input_shape: of one sample, for example (3, 224, 224); the report counts multiply-adds if it is given.

    Returns:
        The pruned copy, a plain module with zeros, and the report.

    Raises:
        ValueError: if `sparsity` lies outside [0, 1), `grid` is below 2, the model returns no tensor, `layers`
            names none, or a weight is not a finite, plain parameter.
    """
    masks = rd_masks(model, sparsity, x, grid=grid, worst_case=worst_case, layers=layers)
    return apply_masks("rate-distortion pruning", model, masks, input_shape)
