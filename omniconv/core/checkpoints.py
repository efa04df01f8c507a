"""PyTorch checkpoints: tensors are read without running code, anything else only on the user's word."""

import os
from pathlib import Path
from typing import Any

import torch

from omniconv.core.errors import DataError, RefusedError

__all__ = ["read_checkpoint"]


def read_checkpoint(path: str | os.PathLike[str], *, trust: bool = False) -> dict[str, torch.Tensor]:
    """Return the tensors of a PyTorch checkpoint by name.

    A checkpoint that holds tensors and plain containers alone is read without running code. Anything else is
    a program, and is loaded only with `trust`.

    Raises:
        DataError: if the file is missing, damaged, or holds no tensors.
        RefusedError: if loading it would run code and `trust` is not given.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no file {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for damaged and for unsafe files
        if not trust:
            if "weights_only" in str(error).lower():
                raise RefusedError(
                    f"{path} can run code when loaded. If you trust it: omniconv convert {path.name} --trust"
                ) from None
            raise DataError(f"{path} is not a PyTorch checkpoint, or it is damaged") from None
        try:
            content = torch.load(path, map_location="cpu", weights_only=False)
        except Exception as inner:
            raise DataError(
                f"{path} cannot be loaded ({type(inner).__name__}: {inner})".splitlines()[0]
            ) from None
    tensors = _tensors(content)
    if not tensors:
        raise DataError(f"{path} holds no tensors")
    return tensors


def _tensors(content: Any) -> dict[str, torch.Tensor]:
    """Return the state dict in a checkpoint: the dict itself, or what it keeps under a usual name."""
    if isinstance(content, torch.nn.Module):
        return dict(content.state_dict())
    if not isinstance(content, dict):
        return {}
    for key in ("state_dict", "model_state_dict", "model", "model_ema", "params", "net"):
        inner = content.get(key)
        if isinstance(inner, torch.nn.Module):
            return dict(inner.state_dict())
        if isinstance(inner, dict) and any(isinstance(v, torch.Tensor) for v in inner.values()):
            content = inner
            break
    return {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}
