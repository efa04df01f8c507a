"""Formats of `STen <https://arxiv.org/abs/2304.07613>`_: in which layout, and how sparse, what an operator gives is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omniconv.ops.sparse.base import Layout, call, find_operator
from omniconv.ops.sparse.sparsifiers import KeepAll, Sparsifier, sparsify

__all__ = ["Format", "sparse_gradient", "sparsified"]

_ALL = KeepAll()


@dataclass(frozen=True)
class Format:
    """The four things that follow an operator.

    Attributes:
        inline: chooses while the operator computes, before the result is in memory.
        temporary: the layout in which it leaves the operator.
        external: chooses among what is there.
        layout: that of the result.
    """

    inline: Sparsifier = _ALL
    temporary: type = Tensor
    external: Sparsifier = _ALL
    layout: type = Tensor

    def __call__(self, x: Tensor | Layout) -> Any:
        """Return a dense result, or one in the temporary layout, in this format."""
        return sparsify(sparsify(x, self.inline, self.temporary), self.external, self.layout)


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.change(grad), None


def sparse_gradient(x: Any, format: Format) -> Any:
    """Return x, a tensor or a layout, whose gradient goes through a format on its way back."""

    def change(gradient: Tensor) -> Tensor:
        whole = x.with_values(gradient).dense() if isinstance(x, Layout) else gradient
        changed = sparsify(format(whole), _ALL, Tensor)
        return x.take(changed) if isinstance(x, Layout) else changed

    if isinstance(x, Layout):
        return x.with_values(_Gradient.apply(x.values, change))
    return _Gradient.apply(x, change)


def sparsified(op: Any, format: Format, gradient: Format | None = None) -> Callable[..., Any]:
    """Return a function of torch whose result is sparse.

    Args:
        op: for example `torch.matmul`; takes layouts as well.
        format: of the result.
        gradient: of the result's gradient.
    """

    def function(*args: Any, **kwargs: Any) -> Any:
        fused = find_operator(op, args, format.temporary) if format.temporary is not Tensor else None
        if fused is None:
            result = sparsify(call(op, *args, **kwargs), format.inline, format.temporary)
        else:
            result = fused(*args, **kwargs, inline=format.inline)
        result = sparsify(result, format.external, format.layout)
        return result if gradient is None else sparse_gradient(result, gradient)

    return function
