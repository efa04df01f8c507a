"""Weights from elsewhere: other names for the same tensors."""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from omniconv.core.errors import UsageError

__all__ = ["Rules", "rename"]

Rules = tuple[tuple[str, str], ...]
"""Pairs (regular expression, replacement), applied to a tensor's name one after another as `re.sub` does.

A family whose names differ from those of its official repository has them as `OFFICIAL_NAMES` in its module.
"""


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
