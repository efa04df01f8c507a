"""Weights from elsewhere: where they lie, other names for the same tensors, other classes and channels."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from omniconv.core.checkpoints import read_checkpoint
from omniconv.core.errors import UsageError
from omniconv.core.weights import load_weights
from omniconv.models.backbone import Backbone
from omniconv.models.hub import HubWeights

__all__ = ["Pretrained", "Rules", "adapt", "read_pretrained", "rename"]

Rules = tuple[tuple[str, str], ...]
"""Pairs (regular expression, replacement), applied to a tensor's name one after another as `re.sub` does.

A family whose names differ from those of its official repository has them as `OFFICIAL_NAMES` in its module.
"""


@dataclass(frozen=True)
class Pretrained:
    """Trained weights and what is known about them.

    Attributes:
        source: path or Hub name that they were read from.
        tensors: by name.
        network: name of the network that they belong to; "" if nothing says so.
    """

    source: str
    tensors: dict[str, Tensor]
    network: str = ""


def read_pretrained(source: str | os.PathLike[str], *, trust: bool = False) -> Pretrained:
    """Read a safetensors file, a PyTorch checkpoint, or `hub:OWNER/NAME[@REVISION]` from the Hub's cache.

    Args:
        source: of the weights. Nothing is ever downloaded: `omniconv weights fetch` does that.
        trust: load a checkpoint although it may run code.

    Raises:
        OmniconvError: one of its subclasses if the weights are not there, damaged, or not to be trusted.
    """
    name = os.fspath(source)
    if name.startswith("hub:"):
        weights = HubWeights.parse(name)
        return Pretrained(name, load_weights(weights.find())[0], weights.network)
    if Path(name).suffix == ".safetensors":
        tensors, header = load_weights(name)
        return Pretrained(name, tensors, header.get("network", ""))
    return Pretrained(name, read_checkpoint(name, trust=trust))


def rename(tensors: Mapping[str, Tensor], rules: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    """Return the tensors under the names that `rules` make of theirs; a name that becomes empty is left out.

    Raises:
        UsageError: if two tensors get the same name.
    """
    patterns = [(re.compile(pattern), replacement) for pattern, replacement in rules]
    renamed: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for name, tensor in tensors.items():
        new = name
        for pattern, replacement in patterns:
            new = pattern.sub(replacement, new)
        if new in renamed:
            raise UsageError(f"{origin[new]} and {name} would both be called {new}; mend the rules")
        if new:
            renamed[new], origin[new] = tensor, name
    return renamed


def adapt(model: Backbone, tensors: Mapping[str, Tensor], rules: Rules = ()) -> dict[str, Tensor]:
    r"""Return the state dict that starts `model` from another network's tensors.

    Names may be those of distributed training (`module.`) or of the official repository (`rules`), and axes of length
    one may differ. A classifier
    for other classes, or none, leaves the model's own as it is. A first convolution of :math:`C` channels becomes
    one of :math:`C'`: with more channels the new ones get the mean of the old, with fewer all do, and the factor

    :math:`C / C'` keeps the answer to pictures whose channels are copies of one another:

    .. math:: \sum_{c'} w'_{oc'} = \sum_c w_{oc}

    Args:
        model: what the tensors are for.
        tensors: by name.
        rules: of the official names; tried where the names do not fit as they are.

    Raises:
        UsageError: if a name is missing or too many, or a shape does not fit; the message names the first.
    """
    own = model.state_dict()
    tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    if rules and not own.keys() <= tensors.keys():
        tensors = rename(tensors, rules)
    classifier = next(name for name, module in model.named_modules() if module is model.get_classifier())
    head = {name for name in own.keys() | tensors.keys() if name.startswith(f"{classifier}.")}
    same_head = all(
        name in own and name in tensors and own[name].shape == tensors[name].shape for name in head
    )
    state: dict[str, Tensor] = {}
    for name, wanted in own.items():
        # Weights from before torch counted batches lack the counters.
        if (name in head and not same_head) or (name not in tensors and name.endswith("num_batches_tracked")):
            state[name] = wanted
            continue
        if name not in tensors:
            raise UsageError(f"the weights have no {name}")
        state[name] = _shaped(tensors[name], wanted.shape)
        if state[name].shape != wanted.shape:
            shapes = f"{tuple(tensors[name].shape)}, the network's {tuple(wanted.shape)}"
            raise UsageError(f"the weights' {name} has the shape {shapes}")
    for name in tensors:
        if name not in own and name not in head:
            raise UsageError(f"the weights have {name}, which the network has not")
    return state


def _shaped(weight: Tensor, shape: torch.Size) -> Tensor:
    """Return a weight in `shape` if it differs in axes of length one or in a convolution's input channels alone."""
    if [n for n in weight.shape if n > 1] == [n for n in shape if n > 1]:
        return weight.reshape(shape)
    old, new = weight.shape[1] if weight.ndim > 2 else 0, shape[1] if len(shape) > 2 else 0
    if old == new or (weight.shape[0], *weight.shape[2:]) != (shape[0], *shape[2:]):
        return weight
    mean = weight.mean(1, keepdim=True)
    kept = weight if new > old else weight[:, :0]
    return torch.cat([kept, *[mean] * (new - kept.shape[1])], 1) * (old / new)
