"""An HTTP server for one network: predictions, explanations, health, metrics and a page to try it on."""

from omniconv.core.errors import ResourceError

try:
    from omniconv.deploy.serve.app import Predictor, create_app, serve
except ModuleNotFoundError as error:
    if (error.name or "").startswith("omniconv"):
        raise
    raise ResourceError(
        f"serving needs {error.name}; install it with: pip install 'omniconv[serve]'"
    ) from None

__all__ = ["Predictor", "create_app", "serve"]
