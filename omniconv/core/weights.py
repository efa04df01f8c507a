"""Weight files: safetensors with a JSON header, never a pickle."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from omniconv.core.errors import DataError, RefusedError
from omniconv.core.files import atomic_path

__all__ = ["load_weights", "read_header", "save_weights"]

_KEY = "omniconv"
_PICKLES = {".pt", ".pth", ".bin", ".ckpt", ".pkl"}


def save_weights(
    path: str | os.PathLike[str], tensors: dict[str, torch.Tensor], header: dict[str, Any] | None = None
) -> None:
    """Write `tensors` and a JSON-serialisable `header` to one safetensors file, atomically.

    Raises:
        RefusedError: if a floating tensor holds a value that is not finite.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise RefusedError(f"{name} is not finite; {Path(path).name} was not written")
    # Tied tensors are stored once a name, and a permuted (channels-last) one in logical order, so the file
    # never depends on the memory format of the run that wrote it.
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    metadata = {_KEY: json.dumps(header or {}, sort_keys=True)}
    with atomic_path(path) as temporary:
        save_file(plain, temporary, metadata=metadata)


def _open(path: str | os.PathLike[str]) -> Any:
    file = Path(path)
    if file.suffix in _PICKLES:
        raise RefusedError(
            f"{file} can run code when loaded. If you trust it: omniconv convert {file.name} --trust"
        )
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError:
        raise DataError(f"no weight file {file}") from None
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file} is not a readable safetensors file ({error})") from None


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the JSON header of a weight file without reading its tensors ({} for foreign safetensors)."""
    with _open(path) as file:
        try:
            return json.loads((file.metadata() or {}).get(_KEY, "{}"))
        except json.JSONDecodeError:
            raise DataError(f"{path} has a damaged header; take another copy of the file") from None


def load_weights(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return (tensors, header) of a safetensors file.

    Raises:
        DataError: if the file is missing or damaged.
        RefusedError: if the file is a pickle, which can run code when loaded.
    """
    header = read_header(path)
    with _open(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118 (not a dict)
