"""Which implementations were measured to be the fastest on this machine, kept from one program to the next.

`omniconv.tune` writes the file, `Table.select` reads it. It lies in the user's cache folder and holds choices alone:
without it, or on another machine, the cost models choose.
"""

import json
import os
import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omniconv.core.files import atomic_write

__all__ = ["choices_file", "describe_call", "forget_choices", "known_choices", "remember_choices"]


def choices_file() -> Path:
    """Return where the choices of this machine are kept."""
    cache_folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache_folder) / "omniconv" / "choices.json"


def _machine() -> str:
    device = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{platform.machine()} {os.cpu_count()} cores, {device}torch {torch.__version__}"


def describe_call(call: tuple[Any, ...]) -> str:
    """Return what a choice depends on: threads, and types, shapes, formats and gradients of all tensors of a call."""
    grad = torch.is_grad_enabled()

    def describe(value: Any) -> str:
        if not isinstance(value, Tensor):
            return repr(value)
        order = sorted(range(value.ndim), key=lambda axis: (-value.stride(axis), axis))
        wanted = " grad" if grad and value.requires_grad else ""
        return f"{value.device.type} {value.dtype} {tuple(value.shape)} {order}{wanted}"

    return "; ".join([f"{torch.get_num_threads()} threads", *map(describe, call)])


@cache
def known_choices() -> dict[str, dict[str, str]]:
    """Return operator -> described call -> name of the implementation, as measured on this machine."""
    try:
        stored = json.loads(choices_file().read_text(encoding="utf-8"))
        choices = stored.get(_machine(), {})
        return {op: dict(calls) for op, calls in choices.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        # No file, or not one of ours: the cost models choose.
        return {}


def remember_choices(op: str, chosen: dict[str, str]) -> None:
    """Keep choices for an operator, beside those that are known.

    Raises:
        OSError: if the file cannot be written.
    """
    known = known_choices()
    known.setdefault(op, {}).update(chosen)
    file = choices_file()
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        stored = {}
    stored = stored if isinstance(stored, dict) else {}
    stored[_machine()] = known
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(file, json.dumps(stored, indent=1) + "\n")


def forget_choices() -> None:
    """Forget all that was measured on this machine."""
    choices_file().unlink(missing_ok=True)
    known_choices.cache_clear()
