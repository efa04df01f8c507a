"""What a network costs: parameters and multiply-adds, counted without running it."""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["Cost", "count_cost", "layer_macs"]


@dataclass(frozen=True)
class Cost:
    """Cost of one forward pass of one sample.

    Attributes:
        parameters: trainable and frozen parameters; buffers do not count.
        macs: multiply-adds of convolutions and matrix products.
    """

    parameters: int
    macs: int


def _count_flops(model: nn.Module, input_shape: tuple[int, ...]) -> FlopCounterMode:
    with torch.device("meta"):
        shadow = copy.deepcopy(model).to("meta").eval()
        x = torch.empty(1, *input_shape)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        shadow(x)
    return counter


def count_cost(model: nn.Module, input_shape: tuple[int, ...]) -> Cost:
    """Count a model's cost on the meta device, so that it takes neither time nor memory.

    Args:
        model: any module; it is left untouched, in its mode and on its device.
        input_shape: of one sample, for example (3, 224, 224).
    """
    counter = _count_flops(model, input_shape)
    return Cost(sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2)


def layer_macs(model: nn.Module, input_shape: tuple[int, ...]) -> dict[str, int]:
    """Return the multiply-adds of every module that has any, by name, counted as `count_cost` does.

    A module's figure includes its children's; the model itself has the name "".
    """
    counts = _count_flops(model, input_shape).get_flop_counts()
    root = type(model).__name__
    macs = {f"{name}.": sum(count.values()) // 2 for name, count in counts.items()}
    return {name[len(root) + 1 : -1]: n for name, n in macs.items() if name.startswith(f"{root}.")}
