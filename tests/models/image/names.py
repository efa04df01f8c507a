"""Parameter names of official repositories, typed in short."""

from collections.abc import Iterable

import torch
from torch import nn

from omniconv.models.weights import Rules, rename

__all__ = ["assert_become_ours", "batch_norm", "layer"]


def layer(*names: str, bias: bool = True) -> list[str]:
    """Return the names of the weights, and the biases, of layers."""
    kinds = ("weight", "bias") if bias else ("weight",)
    return [f"{name}.{kind}" for name in names for kind in kinds]


def batch_norm(*names: str) -> list[str]:
    """Return the names of everything that batch norms keep."""
    kinds = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return [f"{name}.{kind}" for name in names for kind in kinds]


def assert_become_ours(official: Iterable[str], rules: Rules, model: nn.Module) -> None:
    """Fail unless the rules turn the official names into exactly those of the model."""
    renamed = rename(dict.fromkeys(official, torch.empty(0)), rules)
    assert set(renamed) == set(model.state_dict())
