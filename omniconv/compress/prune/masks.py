"""Masks: which weights stay, how they are chosen from scores, and how fine-tuning keeps the others at zero.

A pruned model is a plain module whose pruned weights are zero. Prunable are the weights of convolutions and
linear layers; biases and norms stay. A mask is a boolean tensor of the weight's shape, True where the weight
stays, under the name of its layer.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Self, TypeVar

import torch
from torch import Tensor, nn

from omniconv.compress.report import CompressionReport, compare, weight_layers
from omniconv.core.config import closest

__all__ = [
    "MaskKeeper",
    "apply_masks",
    "hold_masks",
    "keep_largest",
    "prunable_weights",
    "prune_count",
    "smallest",
]

M = TypeVar("M", bound=nn.Module)


def prunable_weights(model: nn.Module, layers: Sequence[str] | None = None) -> dict[str, nn.Parameter]:
    """Return the weights of convolutions and linear layers by the name of their layer, shared ones once.

    Args:
        model: any module.
        layers: names of the layers to take; all by default.

    Raises:
        ValueError: if there is no such layer, or a weight is not a finite, plain parameter.
    """
    found = weight_layers(model)
    if layers is not None:
        for name in layers:
            if name not in found:
                hint = closest(name, list(found))
                raise ValueError(f"layers: {name!r} is no convolution or linear layer of this model{hint}")
        found = {name: module for name, module in found.items() if name in set(layers)}
    weights: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, module in found.items():
        weight = module._parameters.get("weight")
        if weight is None:
            raise ValueError(
                f"{name}.weight is computed from other parameters; remove its parametrization first"
            )
        if not torch.isfinite(weight).all():
            raise ValueError(f"{name}.weight is not finite; train again from a finite checkpoint")
        if id(weight) not in seen:
            seen.add(id(weight))
            weights[name] = weight
    if not weights:
        raise ValueError("the model has no convolution or linear layer to prune")
    return weights


def prune_count(sparsity: float, entries: int) -> int:
    """Return how many of `entries` weights to prune, `round(sparsity * entries)`.

    Raises:
        ValueError: if `sparsity` lies outside [0, 1).
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must lie in [0, 1): got {sparsity}")
    return round(sparsity * entries)


def smallest(scores: Tensor, count: int) -> Tensor:
    """Return a mask of exactly `count` smallest entries of a 1-d tensor; of equal ones the earlier first."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(count).values
    chosen = scores < threshold
    ties = (scores == threshold).nonzero().squeeze(1)
    chosen[ties[: count - int(chosen.sum())]] = True
    return chosen


def keep_largest(scores: Mapping[str, Tensor], sparsity: float, min_weights: int = 0) -> dict[str, Tensor]:
    """Choose masks that drop the smallest scores under one threshold across all layers.

    Args:
        scores: finite, real, of each weight's shape, by layer.
        sparsity: share of all weights to drop, in [0, 1); exact to one weight.
        min_weights: weights that every layer keeps at least (all of a smaller layer). What a layer keeps for
            this reason goes elsewhere, so the sparsity stays the same. No layer goes empty then, but what is
            left in deep, narrow networks without shortcuts need not connect input and output.

    Returns:
        Masks by layer, on the device of the scores.

    Raises:
        ValueError: if `sparsity` lies outside [0, 1), or leaves fewer weights than the layers keep at least.
    """
    if min_weights < 0:
        raise ValueError(f"min_weights must not be negative: got {min_weights}")
    flat = {name: score.detach().reshape(-1).cpu() for name, score in scores.items()}
    total = sum(map(len, flat.values()))
    count = prune_count(sparsity, total)
    kept = sum(min(min_weights, len(score)) for score in flat.values())
    if count > total - kept:
        raise ValueError(
            f"sparsity {sparsity} leaves {total - count} of {total} weights, but min_weights {min_weights} "
            f"keeps {kept} in {len(flat)} layers; lower one of them"
        )
    if min_weights:
        # A layer's own best are out of reach of the common threshold.
        flat = {
            name: score.masked_fill(~smallest(score, max(0, len(score) - min_weights)), torch.inf)
            for name, score in flat.items()
        }
    dropped = smallest(torch.cat(list(flat.values())), count).split([len(score) for score in flat.values()])
    return {
        name: ~drop.reshape(score.shape).to(score.device)
        for (name, score), drop in zip(scores.items(), dropped, strict=True)
    }


def apply_masks(
    method: str, model: M, masks: Mapping[str, Tensor], input_shape: tuple[int, ...] | None = None
) -> tuple[M, CompressionReport]:
    """Return a copy of `model` whose weights are zero where their mask is False, and the report.

    Args:
        method: name of the transform, for the report.
        model: stays as it is.
        masks: by layer.
        input_shape: of one sample; the report counts multiply-adds if it is given.
    """
    pruned = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks.items():
            pruned.get_submodule(name).get_parameter("weight").masked_fill_(~mask, 0)
    notes = []
    empty = [name for name, mask in masks.items() if not mask.any()]
    if empty:
        notes.append(f"No weight is left in {', '.join(empty)}; min_weights prevents that.")
    notes.append("Zeros make a file written by save_sparse smaller; dense kernels compute them at full cost.")
    return pruned, compare(method, model, pruned, input_shape=input_shape, notes=tuple(notes))


class MaskKeeper:
    """Keeps pruned weights at zero while a model trains, with any optimizer.

    Gradients of pruned weights are zero, so that they count neither for clipping nor for statistics that an
    optimizer shares between weights. As momentum from before the pruning can still move a weight, `apply`
    sets them to zero again: after each step by itself if the optimizer is given, else by your call.

    Use it as a context, or call `release` at the end.

    Args:
        model: is trained in place.
        masks: by layer.
        optimizer: after each of its steps the masks are applied.
    """

    def __init__(
        self, model: nn.Module, masks: Mapping[str, Tensor], optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        self.model = model
        self.masks = dict(masks)
        self._weights = {name: model.get_submodule(name).get_parameter("weight") for name in masks}
        self._hooks = [
            weight.register_hook(lambda gradient, name=name: gradient.masked_fill(~self._mask(name), 0))
            for name, weight in self._weights.items()
            if weight.requires_grad
        ]
        if optimizer is not None:
            self._hooks.append(optimizer.register_step_post_hook(lambda *_: self.apply()))
        self.apply()

    def _mask(self, name: str) -> Tensor:
        # The model may have moved since the masks were made.
        self.masks[name] = self.masks[name].to(self._weights[name].device)
        return self.masks[name]

    @torch.no_grad()
    def apply(self) -> None:
        """Set the pruned weights to zero."""
        for name, weight in self._weights.items():
            weight.masked_fill_(~self._mask(name), 0)

    def update(self, masks: Mapping[str, Tensor]) -> None:
        """Hold other masks from now on, of the same layers, and apply them."""
        if masks.keys() != self.masks.keys():
            raise ValueError(
                f"masks must be of the layers held: got {sorted(masks)} and {sorted(self.masks)}"
            )
        self.masks = dict(masks)
        self.apply()

    def release(self) -> None:
        """Let the weights go; they are zero until the next step."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def hold_masks(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, layers: Sequence[str] | None = None
) -> MaskKeeper:
    """Hold every prunable weight of `model` that is zero now at zero; see `MaskKeeper`.

    Args:
        model: is trained in place.
        optimizer: after each of its steps the masks are applied; without it call `apply` yourself.
        layers: names of the layers to hold; all by default.
    """
    masks = {name: weight.detach() != 0 for name, weight in prunable_weights(model, layers).items()}
    return MaskKeeper(model, masks, optimizer)
