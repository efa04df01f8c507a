"""Spatial CNN: messages that run over a map slice by slice, down, up, right and left.

Paper: Pan et al., Spatial As Deep, https://arxiv.org/abs/1712.06080. Initial weights are those of the authors' code.
"""

import itertools
import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.cases import Case, Raises

__all__ = ["Direction", "SpatialCNN", "pass_messages"]

Direction = Literal["down", "up", "right", "left"]


def pass_messages(x: Tensor, weight: Tensor, direction: Direction = "down") -> Tensor:
    r"""Add to every slice of a map the rectified convolution of its neighbour, which has heard from all before it.

    .. math:: y_0 = x_0, \qquad y_i = x_i + \max(0, w * y_{i-1})

    Args:
        x: the map.
        weight: a kernel along the slice, over all channels.
        direction: whether slices are rows, from the first ("down") or the last ("up"), or columns, from the first
            ("right") or the last ("left").

    Shapes:
        - x and output: :math:`(N, C, H, W)`
        - weight: :math:`(C, C, w)` with odd w
    """
    axis = 2 if direction in ("down", "up") else 3
    slices = list(x.movedim(axis, 0).contiguous().unbind())
    order = range(len(slices)) if direction in ("down", "right") else range(len(slices) - 1, -1, -1)
    for before, index in itertools.pairwise(order):
        message = F.conv1d(slices[before], weight, padding=weight.shape[2] // 2)
        slices[index] = slices[index] + F.relu(message)
    return torch.stack(slices).movedim(0, axis)


class SpatialCNN(nn.Module):
    r"""Message passing between the slices of a map of `Spatial CNN <https://arxiv.org/abs/1712.06080>`_.

    .. math:: y_i = x_i + \max(0, w_d * y_{i-1})

    over rows or columns i, once in each direction d, each pass reading what the one before has written. What a
    corner holds reaches the opposite corner in one layer of :math:`4 C^2 w` weights. The steps wait for each other,
    so a map of H rows and W columns takes 2 (H + W) of them; compiled and exported programs are for one size of map.

    Args:
        channels: C.
        kernel_size: w, odd, along the slice.
        directions: the passes, in their order.
        device, dtype: of the parameters.

    Shapes:
        - input and output: :math:`(N, C, H, W)`

    Raises:
        ValueError: if `kernel_size` is even or a direction is unknown or twice there.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 9,
        directions: tuple[Direction, ...] = ("down", "up", "right", "left"),
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive: got {kernel_size}")
        if not set(directions) <= set(get_args(Direction)) or len(set(directions)) < len(directions):
            raise ValueError(f"directions must be different ones of {get_args(Direction)}: got {directions}")
        self.weight = nn.ParameterDict(
            {
                direction: nn.Parameter(
                    torch.empty(channels, channels, kernel_size, device=device, dtype=dtype)
                )
                for direction in directions
            }
        )
        self.directions = directions
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights, so small that messages stay below what they are added to."""
        for weight in self.weight.values():
            nn.init.normal_(weight, std=math.sqrt(2 / (5 * weight.numel())))

    def forward(self, x: Tensor) -> Tensor:
        """Pass messages over `x` in every direction."""
        for direction in self.directions:
            x = pass_messages(x, self.weight[direction], direction)
        return x


CASES = (
    Case(
        SpatialCNN,
        {"channels": 4, "kernel_size": 3},
        inputs=((2, 4, 6, 5),),
        output=(2, 4, 6, 5),
        vary=(0,),
        minimal=(1, 4, 1, 1),
        channels_last=False,
        raises=(
            Raises(
                ValueError,
                "kernel_size must be odd and positive: got 4",
                {"channels": 4, "kernel_size": 4},
            ),
            Raises(
                ValueError,
                "directions must be different ones of ('down', 'up', 'right', 'left'): got ('down', 'down')",
                {"channels": 4, "directions": ("down", "down")},
            ),
        ),
    ),
)
