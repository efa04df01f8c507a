"""Weight files: safetensors with a JSON header, never a pickle.

A tensor with many zeros can be stored packed: as `NAME#mask` and `NAME#values` (see `omniconv.core.packing`),
with its shape under `omniconv.packed` in the file's metadata. `load_weights` gives it back as it was.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from omniconv.core.errors import DataError, RefusedError
from omniconv.core.files import atomic_path
from omniconv.core.packing import pack, unpack

__all__ = ["load_weights", "read_header", "save_weights"]

_KEY = "omniconv"
_PACKED = "omniconv.packed"
_PICKLES = {".pt", ".pth", ".bin", ".ckpt", ".pkl"}


def save_weights(
    path: str | os.PathLike[str],
    tensors: dict[str, torch.Tensor],
    header: dict[str, Any] | None = None,
    *,
    packed: bool = False,
) -> None:
    """Write `tensors` and a JSON-serialisable `header` to one safetensors file, atomically.

    Args:
        path: of the file.
        tensors: by name.
        header: what `read_header` gives back.
        packed: store a tensor as bit mask and values where that is smaller. Nothing is lost, but other
            readers of safetensors then see the parts.

    Raises:
        RefusedError: if a floating tensor holds a value that is not finite.
    """
    for name, tensor in tensors.items():
        # isfinite does not take float8.
        wide = tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor
        if wide.is_floating_point() and not torch.isfinite(wide).all():
            raise RefusedError(f"{name} is not finite; {Path(path).name} was not written")
    # Tied tensors are stored once a name, and a permuted (channels-last) one in logical order, so the file
    # never depends on the memory format of the run that wrote it.
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    metadata = {_KEY: json.dumps(header or {}, sort_keys=True)}
    if packed:
        shapes = _pack_all(plain)
        if shapes:
            metadata[_PACKED] = json.dumps(shapes, sort_keys=True)
    with atomic_path(path) as temporary:
        save_file(plain, temporary, metadata=metadata)


def _parts(name: str) -> tuple[str, str]:
    return f"{name}#mask", f"{name}#values"


def _pack_all(tensors: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    """Replace tensors by their packed parts where that is smaller; return the shapes of the replaced ones."""
    shapes: dict[str, list[int]] = {}
    for name, tensor in list(tensors.items()):
        # A name that is taken leaves the tensor plain.
        packed = None if any(part in tensors for part in _parts(name)) else pack(tensor)
        if packed is not None:
            shapes[name] = list(tensor.shape)
            del tensors[name]
            tensors.update(zip(_parts(name), packed, strict=True))
    return shapes


def _packed_shapes(path: str | os.PathLike[str], file: Any) -> dict[str, list[int]]:
    try:
        shapes = json.loads((file.metadata() or {}).get(_PACKED, "{}"))
    except json.JSONDecodeError:
        shapes = None
    if not isinstance(shapes, dict) or not all(
        isinstance(shape, list) and all(type(size) is int and size > 0 for size in shape)
        for shape in shapes.values()
    ):
        raise DataError(f"{path} has a damaged list of packed tensors; take another copy of the file")
    return shapes


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
    """Return (tensors, header) of a safetensors file; packed tensors come back as they were.

    Raises:
        DataError: if the file is missing or damaged.
        RefusedError: if the file is a pickle, which can run code when loaded.
    """
    header = read_header(path)
    with _open(path) as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}
        shapes = _packed_shapes(path, file)
    for name, shape in shapes.items():
        try:
            mask, values = (stored.pop(part) for part in _parts(name))
            stored[name] = unpack(mask, values, shape)
        except (KeyError, ValueError) as error:
            raise DataError(
                f"{path}: {name} cannot be unpacked ({error}); take another copy of the file"
            ) from None
    return stored, header
