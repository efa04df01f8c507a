"""Networks by name."""

import dataclasses
import fnmatch
import os
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch

from omniconv.core.config import closest
from omniconv.core.errors import UsageError
from omniconv.core.registry import Registry
from omniconv.models.backbone import Backbone, FeatureExtractor, Variant
from omniconv.models.weights import Pretrained, Rules, adapt, read_pretrained

__all__ = ["create_model", "get_variant", "list_models", "official_names"]

_MODELS = Registry("omniconv.models", "VARIANTS", "model")


def list_models(pattern: str = "*") -> list[str]:
    """Return the names of all networks that match a shell pattern, sorted.

    Variants for tests (`*_test`) are left out unless the pattern names them.
    """
    hidden = not pattern.endswith("_test")
    return [
        name
        for name in _MODELS.names()
        if fnmatch.fnmatchcase(name, pattern) and not (hidden and name.endswith("_test"))
    ]


def get_variant(name: str) -> Variant:
    """Return the configuration and published figures of a network.

    Raises:
        UsageError: if no network has this name; the message names the nearest one.
    """
    return _MODELS.find(name)[1]


def official_names(name: str) -> Rules:
    """Return the rules that turn the tensor names of a network's official repository into those here."""
    return getattr(_MODELS.find(name)[0], "OFFICIAL_NAMES", ())


@overload
def create_model(name: str, *, features_only: Literal[False] = False, **kwargs: Any) -> Backbone: ...
@overload
def create_model(name: str, *, features_only: Literal[True], **kwargs: Any) -> FeatureExtractor: ...
def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    pretrained: Literal[False] | str | os.PathLike[str] | Pretrained = False,
    trust: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **overrides: Any,
) -> Backbone | FeatureExtractor:
    """Make a network.

    Args:
        name: one of `list_models()`.
        num_classes: outputs of the classifier; 0 leaves the pooled features.
        in_chans: channels of the input images.
        features_only: return feature maps instead of logits.
        out_indices: with `features_only`, which of the maps.
        pretrained: weights to start from: a safetensors file, a PyTorch checkpoint, what `read_pretrained` gave, or
            `hub:OWNER/NAME` for weights in the Hub's cache on this machine. Every tensor must fit, but for a
            classifier of other classes, which starts anew, and the first convolution, whose input channels may
            differ (see `adapt`). Nothing is ever downloaded: `omniconv weights fetch` does that.
        trust: load a checkpoint although it may run code.
        device: where the parameters are made (`"meta"` makes none).
        dtype: of the parameters.
        **overrides: fields of the family's configuration that replace those of the variant.

    Raises:
        UsageError: if the name or an override is unknown, when the message names the nearest one, or if the weights
            do not fit.
        OmniconvError: one of its subclasses if the weights are not there, damaged, or not to be trusted.
    """
    variant = get_variant(name)
    fields = [field.name for field in dataclasses.fields(variant.config)]
    for key in overrides:
        if key not in fields:
            raise UsageError(f"{name} has no option {key!r}{closest(key, fields)}")
    config = dataclasses.replace(variant.config, **overrides)
    if pretrained is True:
        raise UsageError(
            f"pretrained takes a file of weights of {name}, or hub:OWNER/NAME; nothing is downloaded"
        )
    with torch.device(device or torch.get_default_device()):
        model = variant.model(config, num_classes, in_chans)
    if dtype is not None:
        model.to(dtype)
    if pretrained:
        weights = pretrained
        if not isinstance(weights, Pretrained):
            weights = read_pretrained(weights, trust=trust)
        try:
            model.load_state_dict(adapt(model, weights.tensors, official_names(name)))
        except UsageError as error:
            raise UsageError(f"{weights.source} does not fit {name}: {error}") from None
    return FeatureExtractor(model, out_indices) if features_only else model
