"""Calls of sparse convolution that its contract runs over."""

import torch
from torch import Tensor

from omniconv.core.cases import OpCase, Raises
from omniconv.ops.sparse_conv.api import sparse_conv

__all__: list[str] = []

_ROWS = 7


def _draw(shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """Return a map into seven rows; about every second tap finds none."""
    found = torch.randint(0, _ROWS, shape, generator=random)
    return torch.where(torch.rand(shape, generator=random) < 0.5, found, -1)


def _case(id: str, outputs: int, channels: tuple[int, int], kernel: tuple[int, ...], **more) -> OpCase:
    taps = torch.Size(kernel).numel()
    inputs = {"x": (_ROWS, channels[0]), "weight": (channels[1], channels[0], *kernel)}
    return OpCase(
        sparse_conv,
        inputs | {"neighbours": (outputs, taps)},
        id=id,
        draw={"neighbours": _draw},
        longer={"x": (_ROWS + 2, channels[0]), "neighbours": (outputs + 2, taps)},
        **more,
    )


CASES = (
    _case(
        "3d",
        9,
        (3, 4),
        (3, 1, 3),
        raises=(
            Raises(
                ValueError,
                "x must be (P, C) and weight (C', C, *k) with the same C: got (7, 2) and (4, 3, 3, 1, 3)",
                inputs=((7, 2), (4, 3, 3, 1, 3), (9, 9)),
            ),
            Raises(
                ValueError,
                "neighbours must be (Q, 9), one column a tap: got (9, 5)",
                inputs=((7, 3), (4, 3, 3, 1, 3), (9, 5)),
            ),
            Raises(
                ValueError,
                "sparse_conv has no impl 'pair'; did you mean pairs? (of auto, torch, pairs)",
                {"impl": "pair"},
            ),
        ),
    ),
    _case("2d", 5, (2, 3), (3, 3)),
    _case("1d", 8, (4, 1), (2,)),
    _case("point", 7, (3, 5), (1,)),
)
