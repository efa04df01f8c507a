"""How a sparsity is shared out to the layers, and what global magnitude pruning is compared with.

Uniform, uniform+, Erdos-Renyi and Erdos-Renyi-kernel rules fix the layers' densities beforehand; LAMP scales
magnitudes by what else its layer holds; SNIP asks the gradient, before training.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from omniconv.compress.prune.global_magnitude import magnitudes
from omniconv.compress.prune.masks import apply_masks, keep_largest, prune_count, smallest
from omniconv.compress.prune.saliency import snip_scores
from omniconv.compress.report import CompressionReport

__all__ = [
    "erdos_renyi_densities",
    "erk_densities",
    "erk_magnitude",
    "keep_counts",
    "lamp",
    "lamp_scores",
    "layer_counts",
    "snip",
    "uniform_densities",
    "uniform_magnitude",
    "uniform_plus_densities",
]

Shapes = Mapping[str, Sequence[int]]
Rule = Callable[[Shapes, int], dict[str, float]]

M = TypeVar("M", bound=nn.Module)


def uniform_densities(shapes: Shapes, kept: int) -> dict[str, float]:
    """Return the same density for every layer; arguments as of `erk_densities`."""
    return dict.fromkeys(shapes, kept / sum(map(math.prod, shapes.values())))


def uniform_plus_densities(shapes: Shapes, kept: int) -> dict[str, float]:
    """Return the densities of uniform+: the first layer whole, of the last at least a fifth, the others alike.

    From `Gale et al. <https://arxiv.org/abs/1902.09574>`_; arguments as of `erk_densities`.

    Raises:
        ValueError: if the first and the last layer take more than is kept.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    if len(sizes) == 1:
        return uniform_densities(shapes, kept)
    first, *_, last = sizes
    fixed = {first: 1.0}
    density = (kept - sizes[first]) / (sum(sizes.values()) - sizes[first])
    if density < 0.2:
        fixed[last] = 0.2
        needed = sizes[first] + 0.2 * sizes[last]
        if needed > kept:
            raise ValueError(
                f"uniform+ keeps the first layer and a fifth of the last, {math.ceil(needed)} weights, "
                f"of {kept}; lower sparsity or take another rule"
            )
        density = (kept - needed) / max(1, sum(sizes.values()) - sizes[first] - sizes[last])
    return {name: fixed.get(name, density) for name in sizes}


def _scaled_densities(shapes: Shapes, weights: Mapping[str, float], kept: int) -> dict[str, float]:
    """Keep weights in proportion to `weights`, but of no layer more than it has."""
    dense: set[str] = set()
    while True:
        budget = kept - sum(math.prod(shapes[name]) for name in dense)
        sparse = [name for name in shapes if name not in dense]
        epsilon = budget / max(1, sum(weights[name] for name in sparse))
        full = {name for name in sparse if epsilon * weights[name] > math.prod(shapes[name])}
        if not full:
            return {
                name: 1.0 if name in dense else epsilon * weights[name] / math.prod(shape)
                for name, shape in shapes.items()
            }
        dense |= full


def erdos_renyi_densities(shapes: Shapes, kept: int) -> dict[str, float]:
    r"""Return Erdos-Renyi densities, from `SET <https://arxiv.org/abs/1707.04780>`_.

    .. math:: d_l = \min\left(1, \epsilon \frac{n_{in} + n_{out}}{n_{in} n_{out}}\right)

    whatever the kernel size; arguments as of `erk_densities`.
    """
    weights = {name: sum(shape[:2]) * math.prod(shape[2:]) for name, shape in shapes.items()}
    return _scaled_densities(shapes, weights, kept)


def erk_densities(shapes: Shapes, kept: int) -> dict[str, float]:
    r"""Return Erdos-Renyi-kernel densities, from `RigL <https://arxiv.org/abs/1911.11134>`_.

    .. math:: d_l = \min(1, \epsilon \frac{\sum_i n_{l,i}}{\prod_i n_{l,i}})

    over the sizes n of a weight, with the one epsilon that keeps `kept` weights in all.

    Args:
        shapes: of each weight, by layer.
        kept: weights to keep, at most as many as there are.
    """
    return _scaled_densities(shapes, {name: sum(shape) for name, shape in shapes.items()}, kept)


def layer_counts(rule: Rule, shapes: Shapes, sparsity: float) -> dict[str, int]:
    """Return how many weights each layer keeps, exact in sum.

    Args:
        rule: gives densities of shapes and of the weights to keep, for example `erk_densities`.
        shapes: of each weight, by layer.
        sparsity: share of all weights to drop, in [0, 1).

    Raises:
        ValueError: if `sparsity` lies outside [0, 1).
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    total = sum(sizes.values())
    kept = total - prune_count(sparsity, total)
    exact = {name: density * sizes[name] for name, density in rule(shapes, kept).items()}
    counts = {name: math.floor(share + 1e-9) for name, share in exact.items()}
    # The largest remainders take what rounding down left over.
    for name in sorted(exact, key=lambda name: counts[name] - exact[name])[: kept - sum(counts.values())]:
        counts[name] += 1
    return counts


def keep_counts(scores: Mapping[str, Tensor], counts: Mapping[str, int]) -> dict[str, Tensor]:
    """Return masks that keep each layer's `counts` largest scores; of equal ones the later stay."""
    return {
        name: ~smallest(score.reshape(-1).cpu(), score.numel() - counts[name])
        .reshape(score.shape)
        .to(score.device)
        for name, score in scores.items()
    }


def _prune_by_rule(
    method: str,
    rule: Rule,
    model: M,
    sparsity: float,
    layers: Sequence[str] | None,
    input_shape: tuple[int, ...] | None,
) -> tuple[M, CompressionReport]:
    scores = magnitudes(model, layers)
    counts = layer_counts(rule, {name: score.shape for name, score in scores.items()}, sparsity)
    return apply_masks(method, model, keep_counts(scores, counts), input_shape)


def uniform_magnitude(
    model: M,
    sparsity: float,
    *,
    layers: Sequence[str] | None = None,
    input_shape: tuple[int, ...] | None = None,
) -> tuple[M, CompressionReport]:
    """Zero the same share of smallest weights in every layer; arguments as of `global_magnitude`."""
    name = "uniform magnitude pruning"
    return _prune_by_rule(name, uniform_densities, model, sparsity, layers, input_shape)


def erk_magnitude(
    model: M,
    sparsity: float,
    *,
    layers: Sequence[str] | None = None,
    input_shape: tuple[int, ...] | None = None,
) -> tuple[M, CompressionReport]:
    """Zero each layer's smallest weights down to its `erk_densities`; arguments as of `global_magnitude`."""
    return _prune_by_rule("ERK magnitude pruning", erk_densities, model, sparsity, layers, input_shape)


def lamp_scores(magnitude: Tensor) -> Tensor:
    r"""Return the scores of `LAMP <https://arxiv.org/abs/2010.07611>`_ of one layer's absolute weights.

    .. math:: s_u = \frac{w_u^2}{\sum_{v \ge u} w_v^2}

    over the weights in ascending order. A layer's largest weight has the score 1, so no layer goes empty.
    """
    order = magnitude.reshape(-1).sort(stable=True).indices
    squares = magnitude.reshape(-1)[order].double().square()
    rest = squares.flip(0).cumsum(0).flip(0)
    scores = torch.empty_like(squares)
    # In a layer of zeros every sum is zero.
    scores[order] = torch.where(rest > 0, squares / rest, 0)
    return scores.reshape(magnitude.shape)


def lamp(
    model: M,
    sparsity: float,
    *,
    layers: Sequence[str] | None = None,
    input_shape: tuple[int, ...] | None = None,
) -> tuple[M, CompressionReport]:
    """Zero the weights of the smallest `lamp_scores`; arguments as of `global_magnitude`."""
    scores = {name: lamp_scores(value) for name, value in magnitudes(model, layers).items()}
    return apply_masks("LAMP", model, keep_largest(scores, sparsity), input_shape)


def snip(
    model: M,
    sparsity: float,
    loss: Callable[[nn.Module], Tensor],
    *,
    layers: Sequence[str] | None = None,
    input_shape: tuple[int, ...] | None = None,
) -> tuple[M, CompressionReport]:
    """Zero the weights of the smallest `snip_scores`; other arguments as of `global_magnitude`."""
    masks = keep_largest(snip_scores(model, loss, layers), sparsity)
    return apply_masks("SNIP", model, masks, input_shape)
