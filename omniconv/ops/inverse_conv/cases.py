"""Calls of the inverse convolution that its contract runs over."""

from typing import Any

import torch
from torch import Tensor

from omniconv.core.cases import OpCase, Raises
from omniconv.ops.inverse_conv.api import inverse_conv

__all__: list[str] = []


def _kernel(shape: tuple[int, ...], random: Any) -> Tensor:
    # Larger ones make systems whose solutions grow from pixel to pixel.
    return 0.2 * torch.randn(shape, generator=random)


def _case(id: str, y: tuple[int, ...], kernel: tuple[int, int], raises: tuple[Raises, ...] = ()) -> OpCase:
    return OpCase(
        inverse_conv,
        {"y": y, "weight": (y[1], y[1], *kernel)},
        id=id,
        draw={"weight": _kernel},
        # The number of steps is fixed in compiled and exported programs.
        longer={"y": (y[0] + 2, *y[1:])},
        raises=raises,
    )


CASES = (
    _case(
        "3x3",
        (2, 3, 5, 4),
        (3, 3),
        raises=(
            Raises(
                ValueError,
                "inverse_conv has no impl 'numba' (of auto, torch, compiled)",
                {"impl": "numba"},
            ),
            Raises(
                ValueError,
                "maps must be (N, C, H, W) and weight (C, C, kh, kw) with the same channels: "
                "got (2, 4, 5, 4) and (3, 3, 3, 3)",
                inputs=((2, 4, 5, 4), (3, 3, 3, 3)),
            ),
        ),
    ),
    _case("2x4", (2, 2, 3, 6), (2, 4)),
    _case("1x1", (2, 4, 3, 2), (1, 1)),
    _case("one channel, kernel larger than the map", (3, 1, 2, 3), (3, 5)),
)
