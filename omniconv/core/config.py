"""Strict configuration: a key that nothing reads is an error, with the nearest valid key beside it."""

import difflib
import os
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from omniconv.core.errors import UsageError
from omniconv.core.files import atomic_write

__all__ = ["Config", "closest"]


def closest(word: str, known: list[str]) -> str:
    """Return `; did you mean X?` for the known word nearest to `word`, or an empty string."""
    match = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {match[0]}?" if match else ""


class Config(BaseModel):
    """Base of every configuration: typed, frozen, YAML on disk, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def parse(cls, values: dict[str, Any], source: str = "configuration") -> Self:
        """Validate `values`; raise UsageError naming `source`, the key, the fault and the nearest key."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            if first["type"] == "extra_forbidden":
                hint = closest(str(first["loc"][-1]), list(cls.model_fields))
                raise UsageError(f"{source} has no setting {key!r}{hint}") from None
            raise UsageError(f"{source}: {key}: {first['msg']} (got {first['input']!r})") from None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read and validate a YAML file."""
        try:
            values = yaml.safe_load(Path(path).read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UsageError(f"cannot read {path}: {error}".splitlines()[0]) from None
        if not isinstance(values, dict):
            raise UsageError(f"{path} must hold key: value lines, got {type(values).__name__}")
        return cls.parse(values, os.fspath(path))

    def save(self, path: str | os.PathLike[str], comment: str = "") -> None:
        """Write the settings as YAML, atomically, with an optional leading comment."""
        lines = "".join(f"# {line}\n" for line in comment.splitlines())
        text = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        atomic_write(path, lines + text)
