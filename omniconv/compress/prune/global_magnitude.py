"""Global magnitude pruning: the smallest weights of the whole network go, under one threshold.

Paper: Gupta et al., Is Complexity Required for Neural Network Pruning?, https://arxiv.org/abs/2209.14624.
One-shot: `global_magnitude`, then fine-tune under `hold_masks`. Gradual: while training, give a `MaskKeeper`
the `magnitude_masks` of a `gradual_sparsity` every few steps.
"""

from collections.abc import Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from omniconv.compress.prune.masks import apply_masks, keep_largest, prunable_weights
from omniconv.compress.report import CompressionReport

__all__ = ["global_magnitude", "gradual_sparsity", "magnitude_masks", "magnitudes"]

M = TypeVar("M", bound=nn.Module)


def magnitudes(model: nn.Module, layers: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Return the absolute prunable weights by layer, in float32 at least."""
    weights = prunable_weights(model, layers)
    absolute = {name: weight.detach().abs() for name, weight in weights.items()}
    return {
        name: value.to(torch.promote_types(value.dtype, torch.float32)) for name, value in absolute.items()
    }


def magnitude_masks(
    model: nn.Module, sparsity: float, *, min_weights: int = 0, layers: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Return the masks of `global_magnitude` for the weights as they are now.

    Zeros are the smallest of all, so while the sparsity does not fall no pruned weight returns.
    """
    return keep_largest(magnitudes(model, layers), sparsity, min_weights)


def global_magnitude(
    model: M,
    sparsity: float,
    *,
    min_weights: int = 0,
    layers: Sequence[str] | None = None,
    input_shape: tuple[int, ...] | None = None,
) -> tuple[M, CompressionReport]:
    r"""Zero the smallest weights of all layers together (`Global MP <https://arxiv.org/abs/2209.14624>`_).

    .. math:: w' = w \cdot [\,|w| > t\,]

    with the one threshold t that leaves the wished share of all weights; of equal weights the earlier goes
    first. With the paper's minimum threshold, `min_weights`, each layer's largest weights stay in any case.

    Args:
        model: any module; it stays as it is. Prunable are the weights of its convolutions and linear layers.
        sparsity: share of the prunable weights to zero, in [0, 1): `round(sparsity * count)` of them exactly.
        min_weights: weights that every layer keeps at least (all of a smaller layer), against layers that
            collapse at extreme sparsity. The sparsity stays the same.
        layers: names of the layers to prune; all by default.
        input_shape: of one sample, for example (3, 224, 224); the report counts multiply-adds if it is given.

    Returns:
        The pruned copy, a plain module with zeros, and the report.

    Raises:
        ValueError: if `sparsity` lies outside [0, 1) or leaves fewer weights than `min_weights` keeps, if
            `layers` names none, or if a weight is not a finite, plain parameter.
    """
    masks = magnitude_masks(model, sparsity, min_weights=min_weights, layers=layers)
    return apply_masks("global magnitude pruning", model, masks, input_shape)


def gradual_sparsity(
    step: int, steps: int, start: float, end: float, *, schedule: Literal["cubic", "uniform"] = "cubic"
) -> float:
    r"""Return the sparsity to prune to at `step` of a gradual pruning.

    .. math:: s = s_1 + (s_0 - s_1) (1 - t)^n, \qquad t = \mathrm{step} / \mathrm{steps}

    with n = 3 for the `cubic schedule <https://arxiv.org/abs/1710.01878>`_, which prunes most early, while
    there is much to spare, and n = 1 for the uniform one.

    Args:
        step: from 0; below it `start` holds, and `end` from `steps` on.
        steps: over which the sparsity rises.
        start: first sparsity.
        end: last sparsity.
        schedule: "cubic" or "uniform".

    Raises:
        ValueError: if `steps` is not positive or the schedule is neither of them.
    """
    powers = {"cubic": 3, "uniform": 1}
    if schedule not in powers:
        raise ValueError(f"schedule must be cubic or uniform: got {schedule!r}")
    if steps < 1:
        raise ValueError(f"steps must be positive: got {steps}")
    left = 1 - min(max(step / steps, 0.0), 1.0)
    return end + (start - end) * left ** powers[schedule]
