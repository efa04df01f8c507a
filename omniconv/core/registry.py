"""Components are found where they live: no list to keep, no import before it is needed."""

import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from omniconv.core.config import closest
from omniconv.core.errors import UsageError

__all__ = ["Registry", "module_names", "resolve"]


def module_names(package: str) -> Iterator[str]:
    """Yield the dotted names of all public modules below `package`, found on disk and not imported."""
    root = importlib.import_module(package)
    for info in pkgutil.iter_modules(root.__path__):
        if info.name.startswith("_"):
            continue
        name = f"{package}.{info.name}"
        if info.ispkg:
            yield from module_names(name)
        else:
            yield name


def resolve(dotted: str) -> Any:
    """Return the object that a dotted name such as `omniconv.layers.attention.se.SqueezeExcite` stands for.

    Raises:
        UsageError: if the module or one of the attributes does not exist.
    """
    parts = dotted.split(".")
    for split in range(len(parts), 0, -1):
        name = ".".join(parts[:split])
        try:
            value: Any = importlib.import_module(name)
        except ModuleNotFoundError as error:
            # A dependency missing inside an existing module is its own error, not a wrong name.
            if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
                raise
            continue
        try:
            for part in parts[split:]:
                value = getattr(value, part)
        except AttributeError:
            break
        return value
    raise UsageError(f"nothing is called {dotted}")


class Registry:
    """Named entries that modules of a package declare in one table each.

    A module takes part by defining `table` (for models: `VARIANTS`), a dict from public name to entry.

    Args:
        package: dotted name of the package whose modules are searched.
        table: name of the module-level dict.
        noun: what an entry is called in messages.
    """

    def __init__(self, package: str, table: str, noun: str) -> None:
        self.package, self.table, self.noun = package, table, noun
        self._entries: dict[str, tuple[ModuleType, Any]] = {}
        self._imported: set[str] = set()

    def _load(self, module_name: str) -> None:
        if module_name in self._imported:
            return
        module = importlib.import_module(module_name)
        self._imported.add(module_name)
        for name, entry in getattr(module, self.table, {}).items():
            other = self._entries.setdefault(name, (module, entry))[0]
            if other is not module:
                raise RuntimeError(f"{self.noun} {name} is defined in {other.__name__} and {module_name}")

    def find(self, name: str) -> tuple[ModuleType, Any]:
        """Return (module, entry) of a name, importing as few modules as possible.

        The order of the search is a guess (modules whose name shares most with `name` come first); what is
        found never depends on it.
        """
        if name not in self._entries:
            modules = list(module_names(self.package))
            stem = {m: m.rpartition(".")[2] for m in modules}
            # `resnet` first for `resnet50`: a module that the name starts with, the longest one first.
            for module in sorted(modules, key=lambda m: (not name.startswith(stem[m]), -len(stem[m]))):
                self._load(module)
                if name in self._entries:
                    break
        if name not in self._entries:
            raise UsageError(f"no {self.noun} {name!r}{closest(name, self.names())}")
        return self._entries[name]

    def names(self) -> list[str]:
        """Return all names, sorted; imports every module of the package."""
        for module in module_names(self.package):
            self._load(module)
        return sorted(self._entries)

    @property
    def path(self) -> Path:
        """The folder of the package."""
        return Path(importlib.import_module(self.package).__path__[0])
