"""The programming model of `STen <https://arxiv.org/abs/2304.07613>`_: layouts, and operators registered for them.

A layout stands in for a tensor: every call of torch that gets one is looked up by the operator and the layouts of its
inputs, and computed on dense tensors, with one warning, where nothing is registered.
"""

import dataclasses
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

__all__ = ["Layout", "call", "find_operator", "register_operator"]

_LOG = logging.getLogger("omniconv")


class Layout(ABC):
    """A tensor that keeps some of its entries; subclasses are frozen dataclasses.

    Their fields are `values`, tensors that say where the values stand, constants, and `shape`. What is
    differentiated and trained are the values.

    Attributes:
        values: the entries kept.
        shape: of the whole tensor.
    """

    values: Tensor
    shape: torch.Size

    @abstractmethod
    def dense(self) -> Tensor:
        """Return the whole tensor, zeros included."""

    @abstractmethod
    def take(self, dense: Tensor) -> Tensor:
        """Return the entries of another tensor that stand where this one keeps its own, as values."""

    @classmethod
    def from_mask(cls, dense: Tensor, mask: Tensor) -> Self:
        """Keep the entries under a mask.

        Raises:
            TypeError: if the layout takes not any mask; sparsifiers are registered for it then.
        """
        raise TypeError(f"{cls.__name__} cannot keep any mask; use a sparsifier that is registered for it")

    def with_values(self, values: Tensor) -> Self:
        """Return the same places with other values."""
        changes: dict[str, Any] = {"values": values}
        return dataclasses.replace(self, **changes)  # pyright: ignore[reportArgumentType, reportType]

    @property
    def mask(self) -> Tensor:
        """True where an entry is kept, even if it is zero."""
        return self.with_values(torch.ones_like(self.values, requires_grad=False)).dense() != 0

    @property
    def dtype(self) -> torch.dtype:
        """Type of the values."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Where the values are."""
        return self.values.device

    @property
    def ndim(self) -> int:
        """How many axes the whole tensor has."""
        return len(self.shape)

    def dim(self) -> int:
        """Return how many axes the whole tensor has."""
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        """Return the shape of the whole tensor, or one of its sizes."""
        return self.shape if dim is None else self.shape[dim]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(_plain(func), *args, **(kwargs or {}))

    def __matmul__(self, other: Any) -> Any:
        return call(torch.matmul, self, other)

    def __add__(self, other: Any) -> Any:
        return call(torch.add, self, other)

    __radd__ = __add__


def _plain(func: Any) -> Any:
    """Return the function of torch that a method of tensors is: `torch.matmul` for `Tensor.__matmul__`."""
    method = getattr(Tensor, func.__name__, None) is func
    return getattr(torch, func.__name__.strip("_"), func) if method else func


_OPERATORS: dict[tuple[Any, tuple[type, ...], type], Callable[..., Any]] = {}
_WARNED: set[tuple[Any, tuple[type, ...]]] = set()


def _kinds(types: tuple[type, ...]) -> tuple[type, ...]:
    while types and types[-1] is Tensor:
        types = types[:-1]
    return types


def register_operator(op: Any, inputs: tuple[type, ...], output: type = Tensor) -> Callable[[Any], Any]:
    """Register how a function of torch is computed on layouts.

    The decorated function takes what `op` takes; it may return NotImplemented for a call that it cannot compute. One
    that gives a layout also takes `inline`, the sparsifier of its output.

    Args:
        op: for example `torch.matmul` or `torch.nn.functional.linear`.
        inputs: layout or `torch.Tensor` of every tensor among the arguments; dense ones at the end may be left out.
        output: layout of the result.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _OPERATORS[op, _kinds(inputs), output] = function
        return function

    return register


def find_operator(op: Any, args: tuple[Any, ...], output: type = Tensor) -> Callable[..., Any] | None:
    """Return what is registered for the layouts of these arguments and of the result, or None."""
    types = tuple(
        type(a) if isinstance(a, Layout) else Tensor for a in args if isinstance(a, Tensor | Layout)
    )
    return _OPERATORS.get((op, _kinds(types), output))


def _dense(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(_dense, value))
    return value.dense() if isinstance(value, Layout) else value


def call(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the dense result of a function of torch, of which any argument may be a layout."""
    if (function := find_operator(op, args)) is not None:
        result = function(*args, **kwargs)
        if result is not NotImplemented:
            return result
    layouts = tuple(type(a) for a in (*args, *kwargs.values()) if isinstance(a, Layout))
    if layouts and (op, layouts) not in _WARNED:
        _WARNED.add((op, layouts))
        names = ", ".join(layout.__name__ for layout in layouts)
        _LOG.warning("%s of %s is computed dense; register_operator can change that", op.__name__, names)
    return op(*map(_dense, args), **{name: _dense(value) for name, value in kwargs.items()})
