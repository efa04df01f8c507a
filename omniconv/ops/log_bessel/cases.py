"""Calls of log I and log K that their contract runs over; orders and arguments lie in all regions of the formulas."""

from typing import Any

import torch
from torch import Tensor

from omniconv.core.cases import OpCase, Raises
from omniconv.ops.log_bessel.iv import log_iv
from omniconv.ops.log_bessel.kv import log_kv

__all__: list[str] = []


def _orders(shape: tuple[int, ...], random: Any) -> Tensor:
    return 40 * torch.rand(shape, generator=random)


def _arguments(shape: tuple[int, ...], random: Any) -> Tensor:
    return 10 ** (3 * torch.rand(shape, generator=random) - 1.3)


def _case(
    op: Any, id: str, v: tuple[int, ...], x: tuple[int, ...], longer: dict[str, tuple[int, ...]], raises=()
):
    draw = {"v": _orders, "x": _arguments}
    return OpCase(op, {"v": v, "x": x}, id=id, draw=draw, longer=longer, raises=raises, twice=False)


CASES = tuple(
    case
    for op in (log_iv, log_kv)
    for case in (
        _case(
            op,
            "elementwise",
            (7, 5),
            (7, 5),
            {"v": (9, 5), "x": (9, 5)},
            raises=(
                Raises(
                    ValueError,
                    "v and x must have shapes that broadcast: got (7, 5) and (4, 2)",
                    inputs=((7, 5), (4, 2)),
                ),
                Raises(
                    ValueError,
                    f"{op.__name__} has no impl 'compile'; did you mean compiled? (of auto, torch, compiled)",
                    {"impl": "compile"},
                ),
            ),
        ),
        _case(op, "one order", (1,), (3, 17), {"x": (5, 17)}),
    )
)
