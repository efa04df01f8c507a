"""Components found where they are defined: nothing to register, and nothing forgotten.

All functions take the dotted name of a package and import every public module below it.
"""

import importlib
import inspect
import typing
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from torch import nn

from omniconv.compress.report import CompressionReport
from omniconv.core.cases import Case, LossCase, OpCase
from omniconv.core.registry import module_names
from omniconv.inspect.artifact import Artifact

__all__ = ["find_artifacts", "find_cases", "find_transforms", "missing_cases", "public_names"]

AnyCase = Case | LossCase | OpCase


def _modules(package: str) -> Iterator[ModuleType]:
    for name in module_names(package):
        yield importlib.import_module(name)


def public_names(package: str) -> dict[str, Any]:
    """Return dotted name -> object of every name in an `__all__` below `package`, where it is defined."""
    found = {}
    for module in _modules(package):
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if getattr(value, "__module__", module.__name__) == module.__name__:
                found[f"{module.__name__}.{name}"] = value
    return found


def find_cases(package: str) -> list[AnyCase]:
    """Return the cases of all modules below `package`, module by module.

    Raises:
        TypeError: if `CASES` of a module holds anything but cases.
    """
    cases: list[AnyCase] = []
    for module in _modules(package):
        for case in getattr(module, "CASES", ()):
            if not isinstance(case, AnyCase):
                raise TypeError(f"CASES of {module.__name__} must hold cases: got {type(case).__name__}")
            cases.append(case)
    return cases


def missing_cases(package: str, *, functions: bool = False) -> list[str]:
    """Return the dotted names of public components below `package` that no case is for.

    Args:
        package: dotted name.
        functions: whether operators, the public functions with an `impl`, are components too.
    """
    covered = {case.op if isinstance(case, OpCase) else case.make for case in find_cases(package)}
    missing = []
    for name, value in public_names(package).items():
        is_class = inspect.isclass(value) and issubclass(value, nn.Module)
        is_op = functions and inspect.isfunction(value) and "impl" in inspect.signature(value).parameters
        if (is_class or is_op) and value not in covered:
            missing.append(name)
    return missing


def _returning(package: str, wanted: Callable[[Any], bool]) -> dict[str, Callable[..., Any]]:
    found = {}
    for name, value in public_names(package).items():
        if inspect.isfunction(value) and wanted(typing.get_type_hints(value).get("return")):
            found[name] = value
    return found


def find_transforms(package: str) -> dict[str, Callable[..., Any]]:
    """Return dotted name -> function of every public function that returns a model and a report."""
    return _returning(package, lambda hint: CompressionReport in typing.get_args(hint))


def find_artifacts(package: str) -> dict[str, Callable[..., Any]]:
    """Return dotted name -> function of every public function that returns an artifact."""
    return _returning(package, lambda hint: inspect.isclass(hint) and issubclass(hint, Artifact))
