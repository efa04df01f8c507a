"""Lottery tickets: train, prune, go back to the first weights, and again.

Paper: Frankle and Carbin, The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks,
https://arxiv.org/abs/1803.03635. The cycle `rounds` takes any training and any way to choose what goes;
`smallest_of_layers` is the paper's. The control, random re-initialisation, is a new network trained under the masks
of a ticket: `apply_masks("control", new, ticket.masks)`. Going back to a later state than the first, as `later work
<https://arxiv.org/abs/1912.05671>`_ does, is the argument `rewind`.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from omniconv.compress.prune.global_magnitude import magnitudes
from omniconv.compress.prune.masks import MaskKeeper, keep_largest
from omniconv.compress.prune.ratios import keep_counts

__all__ = [
    "Choose",
    "Round",
    "conv_network",
    "drop_smallest",
    "lenet_300_100",
    "rounds",
    "smallest_of_all",
    "smallest_of_layers",
]

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")

Masks = Mapping[str, Tensor]
Choose = Callable[[nn.Module, Masks], dict[str, Tensor]]
"""Takes a trained model and the masks under which it was trained, and returns masks that keep less."""


def _survivors(scores: Mapping[str, Tensor], masks: Masks) -> dict[str, Tensor]:
    """Return scores in which what is pruned already comes first."""
    return {name: scores[name].masked_fill(~mask, -torch.inf) for name, mask in masks.items()}


def drop_smallest(scores: Mapping[str, Tensor], masks: Masks, count: int) -> dict[str, Tensor]:
    """Return masks that keep `count` weights less, those of the smallest scores of all layers together."""
    total = sum(mask.numel() for mask in masks.values())
    gone = total - sum(int(mask.sum()) for mask in masks.values())
    return keep_largest(_survivors(scores, masks), (gone + count) / total)


def smallest_of_layers(rate: float = 0.2, rates: Mapping[str, float] | None = None) -> Choose:
    """Drop in each layer the share `rate` of the weights that are left, the smallest ones.

    Args:
        rate: for layers that `rates` does not name.
        rates: by layer; the paper halves the rate of the output layer.
    """

    def choose(model: nn.Module, masks: Masks) -> dict[str, Tensor]:
        counts = {}
        for name, mask in masks.items():
            left = int(mask.sum())
            counts[name] = left - round((rates or {}).get(name, rate) * left)
        return keep_counts(_survivors(magnitudes(model, list(masks)), masks), counts)

    return choose


def smallest_of_all(
    rate: float = 0.2, scores: Callable[[nn.Module], Mapping[str, Tensor]] = magnitudes
) -> Choose:
    """Drop the share `rate` of all weights that are left, those of the smallest scores.

    Args:
        rate: of a round.
        scores: gives scores of a model by layer, such as `magnitudes`, or a loss bound to `snip_scores`.
    """

    def choose(model: nn.Module, masks: Masks) -> dict[str, Tensor]:
        left = sum(int(mask.sum()) for mask in masks.values())
        return drop_smallest(scores(model), masks, round(rate * left))

    return choose


@dataclass(frozen=True)
class Round(Generic[T]):
    """One training of the cycle.

    Attributes:
        masks: under which it ran, by layer.
        result: what the training returned.
    """

    masks: dict[str, Tensor]
    result: T

    @property
    def density(self) -> float:
        """Share of the prunable weights that are left."""
        return sum(int(m.sum()) for m in self.masks.values()) / sum(m.numel() for m in self.masks.values())


def rounds(
    model: M,
    train: Callable[[M], T],
    choose: Choose,
    count: int,
    *,
    rewind: Mapping[str, Any] | None = None,
) -> Iterator[Round[T]]:
    r"""Train `model`, prune it and rewind it, `count` times, and train a last time (`lottery tickets <https://arxiv.org/abs/1803.03635>`_).

    .. math:: \theta_j = \mathrm{train}(m_j \odot \theta_0), \qquad
       m_{j+1} = \mathrm{choose}(\theta_j, m_j) \le m_j

    Args:
        model: a new network; it is changed in place, and at each yield is as its training left it.
        train: trains a model in place and returns what it measured. Gradients of pruned weights are zero, so they
            stay zero with an optimizer made anew in each call.
        choose: which weights stay, for example `smallest_of_layers()`. One-shot pruning is one round of a high
            rate.
        count: prunings; there is one training more.
        rewind: the state to go back to, `copy.deepcopy(model.state_dict())` of a moment early in training; the
            one at the start by default.

    Yields:
        One `Round` a training, the first of the dense network.
    """
    rewind = copy.deepcopy(model.state_dict()) if rewind is None else rewind
    masks = {name: torch.ones_like(value, dtype=torch.bool) for name, value in magnitudes(model).items()}
    for step in range(count + 1):
        with MaskKeeper(model, masks) as keeper:
            result = train(model)
            keeper.apply()
        yield Round(masks, result)
        if step < count:
            masks = choose(model, masks)
            model.load_state_dict(rewind)


def _initialised(network: nn.Sequential) -> nn.Sequential:
    """Draw weights as the paper does, Gaussian Glorot, with biases of zero."""
    for module in network:
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_normal_(module.weight)
            nn.init.zeros_(module.get_parameter("bias"))
    return network


def lenet_300_100(inputs: int = 784, num_classes: int = 10) -> nn.Sequential:
    """Return LeNet-300-100, three linear layers, 266,610 parameters for 28 x 28 pixels."""
    return _initialised(
        nn.Sequential(
            nn.Flatten(),
            *(nn.Linear(inputs, 300), nn.ReLU()),
            *(nn.Linear(300, 100), nn.ReLU()),
            nn.Linear(100, num_classes),
        )
    )


def conv_network(depth: int, num_classes: int = 10) -> nn.Sequential:
    """Return the paper's Conv-2, Conv-4 or Conv-6 for 32 x 32 pixels.

    Args:
        depth: 2, 4 or 6 convolutions of 64, 128 and 256 channels, in pairs with a max pooling.
        num_classes: outputs.

    Raises:
        ValueError: if `depth` is none of these.
    """
    if depth not in (2, 4, 6):
        raise ValueError(f"depth must be 2, 4 or 6: got {depth}")
    layers: list[nn.Module] = []
    channels, size = 3, 32
    for width in (64, 128, 256)[: depth // 2]:
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        channels, size = width, size // 2
    layers += [nn.Flatten(), nn.Linear(channels * size * size, 256), nn.ReLU()]
    return _initialised(nn.Sequential(*layers, nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, num_classes)))
