"""What a network costs: parameters and multiply-adds, counted without running it."""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["Cost", "count_cost"]


@dataclass(frozen=True)
class Cost:
    """Cost of one forward pass of one sample.

    Attributes:
        parameters: trainable and frozen parameters; buffers do not count.
        macs: multiply-adds of convolutions and matrix products.
    """

    parameters: int
    macs: int


def count_cost(model: nn.Module, input_shape: tuple[int, ...]) -> Cost:
    """Count a model's cost on the meta device, so that it takes neither time nor memory.

    Args:
        model: any module; it is left untouched, in its mode and on its device.
        input_shape: of one sample, for example (3, 224, 224).
    """
    with torch.device("meta"):
        shadow = copy.deepcopy(model).to("meta").eval()
        x = torch.empty(1, *input_shape)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        shadow(x)
    return Cost(sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2)
