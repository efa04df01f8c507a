"""Activating while pruning: part of each cut goes to negative weights that hold ReLUs at zero.

Paper: Liu et al., AP: Selective Activation for De-sparsifying Pruned Neural Networks,
https://arxiv.org/abs/2212.06145. It accompanies any way to score weights in the cycle of `lottery_ticket.rounds`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from omniconv.compress.prune.global_magnitude import magnitudes
from omniconv.compress.prune.lottery_ticket import Choose, Masks, drop_smallest
from omniconv.compress.report import weight_layers

__all__ = ["DeadNeurons", "activate_while_pruning", "dead_neurons"]


def activate_while_pruning(
    reference: Mapping[str, Tensor],
    rate: float = 0.2,
    share: float = 0.02,
    scores: Callable[[nn.Module], Mapping[str, Tensor]] = magnitudes,
) -> Choose:
    r"""Choose what a cycle drops, of all weights that are left (`AP <https://arxiv.org/abs/2212.06145>`_).

    .. math:: p - q \text{ by the smallest scores, then } q \text{ by the smallest } |w - w_0|
       \text{ with } w < 0

    A negative weight that training did not move keeps its ReLU shut and will go on doing so.

    Args:
        reference: the state with which the cycle's training began, the one that `rounds` rewinds to.
        rate: p, the share that a cycle drops.
        share: q, the part of it that goes to negative weights.
        scores: of the method that AP accompanies, such as `magnitudes`, or a loss bound to `snip_scores`.

    Raises:
        ValueError: if `share` exceeds `rate`.
    """
    if not 0 <= share <= rate < 1:
        raise ValueError(f"share must lie between 0 and rate, below 1: got {share} and {rate}")

    def choose(model: nn.Module, masks: Masks) -> dict[str, Tensor]:
        left = sum(int(mask.sum()) for mask in masks.values())
        host, wanted = scores(model), round(share * left)
        kept = drop_smallest(host, masks, round(rate * left) - wanted)
        weights = {name: model.get_submodule(name).get_parameter("weight").detach() for name in masks}
        negative = {name: mask & (weights[name] < 0) for name, mask in kept.items()}
        moved = {
            name: (weight - reference[f"{name}.weight"]).abs().masked_fill(~negative[name], torch.inf)
            for name, weight in weights.items()
        }
        found = min(wanted, sum(int(mask.sum()) for mask in negative.values()))
        kept = drop_smallest(moved, kept, found)
        # Where there are too few negative weights, the host takes the rest.
        return drop_smallest(host, kept, wanted - found)

    return choose


@dataclass(frozen=True)
class DeadNeurons:
    """Shares of ReLU outputs that are zero.

    Attributes:
        static: those of neurons without a weight: all that come in are pruned.
        dynamic: the others, shut by their inputs.
    """

    static: float
    dynamic: float

    @property
    def total(self) -> float:
        """Share of all zeros."""
        return self.static + self.dynamic


class _Relus(TorchDispatchMode):
    """Counts zeros of every ReLU, be it a module or a function."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = self.dead = self.static = 0
        # Of the layer that ran last, its outputs without a weight and the dimension of its outputs.
        self.unfed = torch.zeros(0, dtype=torch.bool)
        self.dim = 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.relu.default, torch.ops.aten.relu_.default):
            zero = output == 0
            self.entries += zero.numel()
            self.dead += int(zero.sum())
            if zero.ndim > 1 and zero.shape[self.dim] == len(self.unfed):
                self.static += int(zero.movedim(self.dim, 0)[self.unfed].sum())
        return output

    def fed_by(self, layer: nn.Module, *_: Any) -> None:
        """Remember the layer that ran last."""
        weight = layer.get_parameter("weight")
        self.dim = -1 if isinstance(layer, nn.Linear) else 1
        self.unfed = ~weight.detach().flatten(1).any(1)


@torch.no_grad()
def dead_neurons(model: nn.Module, batches: Iterable[Tensor]) -> DeadNeurons:
    """Measure how many ReLU outputs are zero, in eval mode.

    A zero is static where the layer that ran last before the ReLU has no weight left for that output; those of
    transposed convolutions are all dynamic.

    Args:
        model: stays as it is.
        batches: inputs.

    Raises:
        ValueError: if no ReLU ran.
    """
    relus = _Relus()
    modes = {module: module.training for module in model.modules()}
    hooks = [layer.register_forward_hook(relus.fed_by) for layer in weight_layers(model).values()]
    try:
        model.eval()
        with relus:
            for x in batches:
                model(x)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    if not relus.entries:
        raise ValueError("the model has no ReLU")
    return DeadNeurons(relus.static / relus.entries, (relus.dead - relus.static) / relus.entries)
