"""What both operators share: their arguments, and the rows of their tables."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from omniconv.ops.dispatch import Implementation, Table
from omniconv.ops.log_bessel import _compiled, _torch
from omniconv.ops.log_bessel.reference import reference


def _prepare(second: bool, v: Tensor | float, x: Tensor) -> tuple[Tensor, Tensor, bool]:
    # A number keeps its digits whatever the type of x.
    order = v if isinstance(v, Tensor) else torch.tensor(v, dtype=torch.float64, device=x.device)
    if not x.is_floating_point() or order.is_complex():
        raise ValueError(f"v must be real and x floating: got {order.dtype} and {x.dtype}")
    try:
        shape = torch.broadcast_shapes(order.shape, x.shape)
    except RuntimeError:
        raise ValueError(
            f"v and x must have shapes that broadcast: got {tuple(order.shape)} and {tuple(x.shape)}"
        ) from None
    if isinstance(v, Tensor) and v.is_floating_point():
        x = x.to(torch.promote_types(v.dtype, x.dtype))
    return order.expand(shape), x.expand(shape), second


def table(op: str, second: bool) -> Table:
    """Return the table of log I or log K."""
    prepare: Any = partial(_prepare, second)
    return Table(
        op,
        prepare,
        reference,
        (
            Implementation("torch", _torch.run, _torch.supports, _torch.estimate),
            Implementation("compiled", _compiled.run, _compiled.supports, _compiled.estimate),
        ),
    )
