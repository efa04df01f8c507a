"""Foreign checkpoints become safetensors, which cannot run code, under the names of the networks here."""

import os
from pathlib import Path

import torch

from omniconv.core.checkpoints import read_checkpoint
from omniconv.core.errors import UsageError
from omniconv.core.weights import load_weights, save_weights
from omniconv.models.factory import create_model, official_names
from omniconv.models.weights import adapt, rename

__all__ = ["convert_checkpoint"]


def convert_checkpoint(
    file: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    model: str | None = None,
    trust: bool = False,
) -> Path:
    """Write the tensors of a PyTorch checkpoint or safetensors file as safetensors; return the new file's path.

    Args:
        file: to read.
        out: to write; by default beside `file`, with another suffix.
        model: network that the weights are for: names become those of the network here, and every shape is checked.
            Its classes and input channels are read from the weights.
        trust: load a checkpoint although it may run code.

    Raises:
        DataError: if the file is missing, damaged, or holds no tensors.
        RefusedError: if loading it would run code and `trust` is not given.
        UsageError: if the weights do not fit the network, or would replace the file that they are read from.
    """
    path = Path(file)
    target = Path(out) if out else path.with_suffix(".safetensors")
    safe = path.suffix == ".safetensors"
    tensors = load_weights(path)[0] if safe else read_checkpoint(path, trust=trust)
    if target.resolve() == path.resolve():
        raise UsageError(f"{path} would be overwritten; name another file with --out")
    if model is not None:
        tensors = _fit(tensors, model, path)
    save_weights(target, tensors, {} if model is None else {"network": model})
    return target


def _fit(tensors: dict[str, torch.Tensor], name: str, path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors under the names of network `name`, whose classes and channels are those of the tensors."""
    network, rules = create_model(name, device="meta"), official_names(name)
    plain = {key.removeprefix("module."): tensor for key, tensor in tensors.items()}
    renamed = plain if network.state_dict().keys() <= plain.keys() else rename(plain, rules)
    classifier = next(key for key, module in network.named_modules() if module is network.get_classifier())
    first = next(key for key, value in network.state_dict().items() if value.ndim > 2)
    classes, filters = renamed.get(f"{classifier}.weight"), renamed.get(first)
    network = create_model(
        name,
        num_classes=0 if classes is None else len(classes),
        in_chans=3 if filters is None else filters.shape[1],
    )
    try:
        return adapt(network, renamed)
    except UsageError as error:
        raise UsageError(f"{path} does not fit {name}: {error}") from None
