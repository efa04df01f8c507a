"""What global magnitude pruning is compared with: fixed ratios a layer, and other scores under one threshold.

Uniform and Erdos-Renyi-kernel ratios share a sparsity out to the layers beforehand; LAMP scales magnitudes by
what else its layer holds; SNIP asks the gradient, before training.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from omniconv.compress.prune.global_magnitude import magnitudes
from omniconv.compress.prune.masks import apply_masks, keep_largest, prunable_weights, prune_count, smallest
from omniconv.compress.report import CompressionReport

__all__ = [
    "erk_densities",
    "erk_magnitude",
    "lamp",
    "lamp_scores",
    "snip",
    "snip_scores",
    "uniform_magnitude",
]

M = TypeVar("M", bound=nn.Module)


def _prune_by_ratio(
    method: str, model: M, densities: Mapping[str, float], kept: int, input_shape: tuple[int, ...] | None
) -> tuple[M, CompressionReport]:
    """Keep each layer's largest weights, `kept` in all, shared out as `densities` say."""
    scores = {name: score.reshape(-1) for name, score in magnitudes(model, list(densities)).items()}
    exact = {name: densities[name] * len(score) for name, score in scores.items()}
    counts = {name: math.floor(share + 1e-9) for name, share in exact.items()}
    # The largest remainders take what rounding down left over.
    for name in sorted(exact, key=lambda name: counts[name] - exact[name])[: kept - sum(counts.values())]:
        counts[name] += 1
    masks = {
        name: ~smallest(score.cpu(), len(score) - counts[name]).reshape(weight.shape).to(weight.device)
        for (name, score), weight in zip(
            scores.items(), prunable_weights(model, list(scores)).values(), strict=True
        )
    }
    return apply_masks(method, model, masks, input_shape)


def uniform_magnitude(
    model: M,
    sparsity: float,
    *,
    layers: Sequence[str] | None = None,
    input_shape: tuple[int, ...] | None = None,
) -> tuple[M, CompressionReport]:
    """Zero the same share of smallest weights in every layer; arguments as of `global_magnitude`."""
    entries = {name: weight.numel() for name, weight in prunable_weights(model, layers).items()}
    total = sum(entries.values())
    kept = total - prune_count(sparsity, total)
    densities = dict.fromkeys(entries, kept / total)
    return _prune_by_ratio("uniform magnitude pruning", model, densities, kept, input_shape)


def erk_densities(shapes: Mapping[str, Sequence[int]], kept: int) -> dict[str, float]:
    r"""Return Erdos-Renyi-kernel densities, from `RigL <https://arxiv.org/abs/1911.11134>`_.

    .. math:: d_l = \min(1, \epsilon \frac{\sum_i n_{l,i}}{\prod_i n_{l,i}})

    over the sizes n of a weight, with the one epsilon that keeps `kept` weights in all.

    Args:
        shapes: of each weight, by layer.
        kept: weights to keep, at most as many as there are.
    """
    dense: set[str] = set()
    while True:
        budget = kept - sum(math.prod(shapes[name]) for name in dense)
        sparse = [name for name in shapes if name not in dense]
        epsilon = budget / max(1, sum(sum(shapes[name]) for name in sparse))
        full = {name for name in sparse if epsilon * sum(shapes[name]) > math.prod(shapes[name])}
        if not full:
            return {
                name: 1.0 if name in dense else epsilon * sum(shape) / math.prod(shape)
                for name, shape in shapes.items()
            }
        dense |= full


def erk_magnitude(
    model: M,
    sparsity: float,
    *,
    layers: Sequence[str] | None = None,
    input_shape: tuple[int, ...] | None = None,
) -> tuple[M, CompressionReport]:
    """Zero each layer's smallest weights down to its `erk_densities`; arguments as of `global_magnitude`."""
    shapes = {name: tuple(weight.shape) for name, weight in prunable_weights(model, layers).items()}
    total = sum(map(math.prod, shapes.values()))
    kept = total - prune_count(sparsity, total)
    return _prune_by_ratio("ERK magnitude pruning", model, erk_densities(shapes, kept), kept, input_shape)


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


def snip_scores(
    model: nn.Module, loss: Callable[[nn.Module], Tensor], layers: Sequence[str] | None = None
) -> dict[str, Tensor]:
    r"""Return the connection sensitivities of `SNIP <https://arxiv.org/abs/1810.02340>`_ by layer.

    .. math:: s = \left| w \, \frac{\partial L}{\partial w} \right|

    Args:
        model: usually untrained; it stays as it is.
        loss: gives the loss of a model on one batch.
        layers: names of the layers to score; all by default.
    """
    shadow = copy.deepcopy(model)
    weights = prunable_weights(shadow, layers)
    gradients = torch.autograd.grad(loss(shadow), list(weights.values()))
    return {
        name: (weight.detach() * gradient).abs().float()
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
    }


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
