"""Existing modules made sparse, after `STen <https://arxiv.org/abs/2304.07613>`_: nothing in their code changes.

A sparse weight is a parametrization: its values are the parameter that optimizers see, where they stand are buffers,
and the module finds a layout under the name of the weight.
"""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from omniconv.ops.sparse.base import Layout
from omniconv.ops.sparse.formats import Format, sparse_gradient

__all__ = ["sparsify_model"]

M = TypeVar("M", bound=nn.Module)


class _Weight(nn.Module):
    """Makes a layout of its values, and sends the gradient through a format."""

    def __init__(self, weight: Tensor | Layout, gradient: Format | None) -> None:
        super().__init__()
        self.extent: torch.Size | None = None
        self.kind, self.gradient = type(weight), gradient
        self.constants: dict[str, Any] = {}
        if isinstance(weight, Layout):
            self.extent = weight.values.shape
            for field in dataclasses.fields(weight):  # pyright: ignore[reportArgumentType]
                value = getattr(weight, field.name)
                if field.name == "values":
                    continue
                if isinstance(value, Tensor):
                    self.register_buffer(field.name, value)
                else:
                    self.constants[field.name] = value

    def layout(self, values: Tensor) -> Any:
        """Return values in their places."""
        if self.extent is None:
            return values
        return self.kind(**{"values": values, **self.constants, **dict(self.named_buffers())})

    def forward(self, values: Tensor) -> Any:
        """Return the weight."""
        weight = self.layout(values)
        return weight if self.gradient is None else sparse_gradient(weight, self.gradient)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the values of a dense weight at the places kept."""
        return weight if self.extent is None else self.layout(weight.new_empty(self.extent)).take(weight)


@dataclasses.dataclass(frozen=True)
class _Output:
    """A forward hook: gives a module's output in a format."""

    format: Format
    gradient: Format

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Any:
        return self.format(sparse_gradient(output, self.gradient))


def sparsify_model(
    model: M,
    weights: Mapping[str, Format] | None = None,
    *,
    weight_gradients: Mapping[str, Format] | None = None,
    intermediates: Mapping[str, Format] | None = None,
    intermediate_gradients: Mapping[str, Format] | None = None,
) -> M:
    """Return a copy of a model with sparse weights, intermediate results and gradients.

    Args:
        model: stays as it is.
        weights: name of a parameter, such as "head.weight", -> its format.
        weight_gradients: name of a parameter -> the format that its gradient goes through.
        intermediates: name of a module -> the format of its output.
        intermediate_gradients: name of a module -> the format that the gradient of its output goes through.

    Raises:
        AttributeError: if the model has no such parameter or module.
    """
    weights, weight_gradients = weights or {}, weight_gradients or {}
    intermediates, intermediate_gradients = intermediates or {}, intermediate_gradients or {}
    model = copy.deepcopy(model)
    for name in dict.fromkeys((*weights, *weight_gradients)):
        owner, _, attribute = name.rpartition(".")
        dense = model.get_parameter(name).detach()
        weight = weights.get(name, Format())(dense)
        if isinstance(weight, Tensor):
            model.get_parameter(name).data.copy_(weight)
        kept = _Weight(weight, weight_gradients.get(name))
        parametrize.register_parametrization(model.get_submodule(owner), attribute, kept, unsafe=True)
    for name in dict.fromkeys((*intermediates, *intermediate_gradients)):
        hook = _Output(intermediates.get(name, Format()), intermediate_gradients.get(name, Format()))
        model.get_submodule(name).register_forward_hook(hook)
    return model
