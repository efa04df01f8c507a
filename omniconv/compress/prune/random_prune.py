"""Random pruning: a mask drawn before training, with the right number of weights in each layer.

Paper: Liu et al., The Unreasonable Effectiveness of Random Pruning: Return of the Most Naive Baseline for Sparse
Training, https://arxiv.org/abs/2202.02643. Prune a new network, then train it under `hold_masks`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from omniconv.compress.prune.masks import apply_masks, prunable_weights
from omniconv.compress.prune.ratios import Rule, erk_densities, keep_counts, layer_counts
from omniconv.compress.report import CompressionReport
from omniconv.core.seeds import generator

__all__ = ["random_masks", "random_prune", "random_prune_like"]

M = TypeVar("M", bound=nn.Module)


def random_masks(
    shapes: Mapping[str, Sequence[int]], counts: Mapping[str, int], seed: int = 0
) -> dict[str, Tensor]:
    """Return masks that keep `counts` weights of each layer, every choice as likely.

    A layer's mask depends on the seed and its name alone.

    Args:
        shapes: of each weight, by layer.
        counts: weights to keep, by layer.
        seed: of the draw.
    """
    scores = {
        name: torch.randperm(math.prod(shape), generator=generator(seed, "mask", name)).reshape(tuple(shape))
        for name, shape in shapes.items()
    }
    return keep_counts(scores, counts)


def _apply(
    method: str, model: M, counts: Mapping[str, int], seed: int, input_shape: tuple[int, ...] | None
) -> tuple[M, CompressionReport]:
    weights = prunable_weights(model, list(counts))
    masks = random_masks({name: weight.shape for name, weight in weights.items()}, counts, seed)
    masks = {name: mask.to(weights[name].device) for name, mask in masks.items()}
    return apply_masks(method, model, masks, input_shape)


def random_prune(
    model: M,
    sparsity: float,
    *,
    rule: Rule = erk_densities,
    seed: int = 0,
    layers: Sequence[str] | None = None,
    input_shape: tuple[int, ...] | None = None,
) -> tuple[M, CompressionReport]:
    r"""Zero weights at random, in each layer as many as a rule says (`random pruning <https://arxiv.org/abs/2202.02643>`_).

    .. math:: w' = w \odot m, \qquad m_l \text{ uniform over the masks with } \textstyle\sum m_l = d_l n_l

    Args:
        model: usually untrained; it stays as it is.
        sparsity: share of the prunable weights to zero, in [0, 1): `round(sparsity * count)` of them exactly.
        rule: gives the layers' densities d: `erk_densities`, `erdos_renyi_densities`, `uniform_densities` or
            `uniform_plus_densities`. For ratios of SNIP, GraSP or SynFlow see `random_prune_like`.
        seed: of the draw.
        layers: names of the layers to prune; all by default.
        input_shape: of one sample, for example (3, 224, 224); the report counts multiply-adds if it is given.

    Returns:
        The pruned copy, a plain module with zeros, and the report.

    Raises:
        ValueError: if `sparsity` lies outside [0, 1), if the rule cannot keep so few, if `layers` names none, or
            if a weight is not a finite, plain parameter.
    """
    shapes = {name: weight.shape for name, weight in prunable_weights(model, layers).items()}
    return _apply("random pruning", model, layer_counts(rule, shapes, sparsity), seed, input_shape)


def random_prune_like(
    model: M,
    masks: Mapping[str, Tensor],
    *,
    seed: int = 0,
    input_shape: tuple[int, ...] | None = None,
) -> tuple[M, CompressionReport]:
    """Zero weights at random, in each layer as many as the masks of another method do.

    With `keep_largest(snip_scores(...), sparsity)` these are the paper's SNIP ratios; likewise for `grasp_scores`,
    and `synflow_masks`.

    Args:
        model: usually untrained; it stays as it is.
        masks: by layer.
        seed: of the draw.
        input_shape: of one sample; the report counts multiply-adds if it is given.
    """
    counts = {name: int(mask.sum()) for name, mask in masks.items()}
    return _apply("random pruning", model, counts, seed, input_shape)
