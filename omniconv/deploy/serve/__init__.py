"""An HTTP server for one network: predictions, explanations, health, metrics and a page to try it on."""

from typing import TYPE_CHECKING, Any

from omniconv.core.errors import ResourceError

if TYPE_CHECKING:
    from omniconv.deploy.serve.app import Predictor, create_app, serve

__all__ = ["Predictor", "create_app", "serve"]


def __getattr__(name: str) -> Any:
    """Import the server when it is asked for: a model repository or a measured pipeline needs none of its packages."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from omniconv.deploy.serve import app
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("omniconv"):
            raise
        raise ResourceError(
            f"serving needs {error.name}; install it with: pip install 'omniconv[serve]'"
        ) from None
    return getattr(app, name)
