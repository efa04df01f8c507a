"""Convolution in all its forms, for PyTorch."""

import importlib
from typing import TYPE_CHECKING, Any

from omniconv.core.version import __version__

if TYPE_CHECKING:
    from omniconv.core.errors import OmniconvError
    from omniconv.deploy.accelerate import accelerate, acceleration, decelerate
    from omniconv.models.factory import create_model, list_models
    from omniconv.ops.tuning import tune
    from omniconv.pipeline.api import check, fit, load
    from omniconv.pipeline.run import Run


# Public name -> module that defines it. Nothing is imported before it is used.
_PUBLIC = {
    "OmniconvError": "omniconv.core.errors",
    "accelerate": "omniconv.deploy.accelerate",
    "acceleration": "omniconv.deploy.accelerate",
    "decelerate": "omniconv.deploy.accelerate",
    "create_model": "omniconv.models.factory",
    "list_models": "omniconv.models.factory",
    "tune": "omniconv.ops.tuning",
    "check": "omniconv.pipeline.api",
    "fit": "omniconv.pipeline.api",
    "load": "omniconv.pipeline.api",
    "Run": "omniconv.pipeline.run",
}
_PACKAGES = (
    "core", "ops", "graphs", "data", "losses", "layers", "models", "tasks", "design",
    "learn", "compress", "inspect", "deploy", "pipeline", "testing", "papers",
)  # fmt: skip

__all__ = [
    "OmniconvError", "Run", "__version__", "accelerate", "acceleration", "check", "create_model", "decelerate", "fit",
    "list_models", "load", "tune",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    if name in _PACKAGES:
        return importlib.import_module(f"omniconv.{name}")
    raise AttributeError(f"module 'omniconv' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_PACKAGES])
