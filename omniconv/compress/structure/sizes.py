"""Attributes that hold sizes (`out_channels`, `num_heads`, widths of a split) follow weights that became smaller."""

import re

from torch import Tensor, nn

__all__ = ["mend_sizes"]

# Integers of these names are sizes that follow the weights'; kernels, strides and windows never do.
_SIZES = re.compile(
    r"head|group|chan|chs|dim|width|feature|embed|plane|hidden|split|shape|size|num_|inner|expan", re.I
)
_NO_SIZES = re.compile(
    r"kernel|stride|pad|dilat|window|block|patch|img|grid|num_classes|scale|ratio|head_dim$", re.I
)
_COUNTS = re.compile(r"(heads|groups)$", re.I)


def mend_sizes(
    model: nn.Module,
    kept: dict[str, dict[int, Tensor]],
    changes: tuple[dict[str, dict[int, set[int]]], dict[str, dict[int, set[int]]]],
    cuts: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]],
    shapes: dict[str, tuple[int, ...]],
) -> None:
    """Let the attributes that hold sizes follow the weights.

    Args:
        model: with the smaller weights.
        kept: which indices were kept, by parameter and dimension.
        changes: old size -> new sizes by module, as its own parameters say and as its tensors and children say.
        cuts: by module the places at which it cut a dimension, before and after.
        shapes: of the parameters before.
    """
    for name, module in model.named_modules():
        weight = f"{name}.weight" if name else "weight"
        if isinstance(module, nn.modules.conv._ConvNd) and weight in kept:
            share = module.weight.shape[0] / shapes[weight][0]
            if module.groups > 1:
                module.groups = round(module.groups * share)
            sides = [module.weight.shape[0], module.weight.shape[1] * module.groups]
            module.in_channels, module.out_channels = sides if module.transposed else sides[::-1]
        elif isinstance(module, nn.Linear) and weight in kept:
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.GroupNorm) and weight in kept:
            if module.num_groups > 1:
                module.num_groups = round(module.num_groups * module.weight.shape[0] / shapes[weight][0])
            module.num_channels = module.weight.shape[0]
        else:
            # What a module's own parameters say goes before what tensors say that only pass through it.
            own, through = (found.get(name, {}) for found in changes)
            _mend_module(module, {**through, **own}, cuts.get(name, []))


def _mend_module(
    module: nn.Module,
    changes: dict[int, set[int]],
    cuts: list[tuple[tuple[int, ...], tuple[int, ...]]],
) -> None:
    places: dict[int, set[int]] = {old: set(new) for old, new in changes.items()}
    parts: dict[tuple[int, ...], tuple[int, ...]] = {}
    for old, new in cuts:
        for a, b in zip(old, new, strict=True):
            places.setdefault(a, set()).add(b)
        parts[_steps(old)] = _steps(new)
    for key, value in list(vars(module).items()):
        if key.startswith("_") or not _SIZES.search(key) or _NO_SIZES.search(key):
            continue
        if type(value) is int:
            new_values = {new for new in places.get(value, ()) if new != value}
            # Heads and groups go, their widths stay, also where there happen to be as many of one as of the other.
            sure = value not in places.get(value, ()) or _COUNTS.search(key)
            if len(new_values) == 1 and sure:
                setattr(module, key, new_values.pop())
        elif isinstance(value, tuple | list) and value and all(type(v) is int for v in value):
            whole = parts.get(tuple(value))
            if whole is None:
                each = [places.get(v, {v}) for v in value]
                if any(len(e) != 1 for e in each):
                    continue
                whole = tuple(next(iter(e)) for e in each)
            setattr(module, key, type(value)(whole))


def _steps(places: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(b - a for a, b in zip((0, *places), places, strict=False))
