"""What converters of whole networks need to know of a network: which shapes its layers see."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["input_shapes"]


def input_shapes(
    model: nn.Module, images: Tensor, kinds: tuple[type[nn.Module], ...]
) -> dict[str, torch.Size]:
    """Return the shape of the first input of every module of some kinds, by the module's name.

    Args:
        model: the network; it is left as it is, in its mode.
        images: a batch that it takes.
        kinds: classes of modules.
    """
    shadow = copy.deepcopy(model).eval()
    shapes: dict[str, torch.Size] = {}

    def noting(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            shapes[name] = args[0].shape

        return hook

    for name, module in shadow.named_modules():
        if isinstance(module, kinds):
            module.register_forward_pre_hook(noting(name))
    with torch.no_grad():
        shadow(images)
    return shapes
