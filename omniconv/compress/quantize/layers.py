"""Layers that quantize their weight and their input, made of the layers of any model.

A quantized layer is still its layer: the same class above it, the same attributes, the same parameter names. Only
`layer.weight` is computed, from the float weight, every time it is asked for. `freeze` puts the rounded weight in
the float one's place, and from then on the state dict holds k-bit codes and scales.
"""

import copy
import functools
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from omniconv.compress.quantize.bits import pack_bits, unpack_bits
from omniconv.compress.quantize.quantizer import Quantizer, Scheme

__all__ = ["QuantizedLayer", "freeze", "plain_layer", "quantize_layer", "quantized_layers"]

M = TypeVar("M", bound=nn.Module)


class QuantizedLayer(nn.Module):
    """What a convolution or linear layer becomes; `quantize_layer` makes it.

    Attributes:
        weight_quantizer: of the weight.
        input_quantizer: of the input, or None.
        active: if not, the layer computes as it did before.
        frozen: whether the parameter holds the rounded weight.
    """

    weight_quantizer: Quantizer
    input_quantizer: Quantizer | None
    active: bool
    frozen: bool

    @property
    def weight(self) -> Tensor:
        """The weight that the layer computes with."""
        weight = self._parameters["weight"]
        assert weight is not None
        return self.weight_quantizer(weight) if self.active and not self.frozen else weight

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute what the layer computes, of the quantized input with the quantized weight."""
        if self.active and self.input_quantizer is not None:
            x = self.input_quantizer(x)
        return super().forward(x, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made on the fly, so pickles and copies say of which one.
        return _new, (type(self).__mro__[2],), self.__dict__

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.frozen:
            codes = self.weight_quantizer.encode(destination.pop(f"{prefix}weight"))
            destination[f"{prefix}weight_codes"] = pack_bits(codes, self.weight_quantizer.bits)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        name = f"{prefix}weight_codes"
        if self.frozen and name in state_dict:
            state_dict = dict(state_dict)
            start = f"{prefix}weight_quantizer."
            scales = {k[len(start) :]: v for k, v in state_dict.items() if k.startswith(start)}
            self.weight_quantizer.load_state_dict(scales)
            weight = self._parameters["weight"]
            assert weight is not None
            codes = unpack_bits(state_dict.pop(name), self.weight_quantizer.bits, weight.shape)
            state_dict[f"{prefix}weight"] = self.weight_quantizer.decode(codes.to(weight.device))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


@functools.cache
def _class_of(base: type[nn.Module]) -> type[nn.Module]:
    return type(f"Quantized{base.__name__}", (QuantizedLayer, base), {"__module__": __name__})


def _new(base: type[nn.Module]) -> nn.Module:
    kind = _class_of(base)
    return kind.__new__(kind)


def quantize_layer(layer: Any, weights: Scheme, inputs: Scheme | None) -> None:
    """Make a `QuantizedLayer` of a convolution or linear layer, in place.

    Args:
        layer: with a plain parameter `weight`; its range is found now.
        weights: scheme of the weight.
        inputs: scheme of the input, whose quantizer is still to be calibrated; None leaves it as it is.

    Raises:
        ValueError: if the weight is no plain parameter, or not finite.
    """
    weight = layer._parameters.get("weight")
    kind = type(layer).__name__
    if weight is None:
        raise ValueError(f"the weight of a {kind} is computed; remove its parametrization first")
    if not torch.isfinite(weight).all():
        raise ValueError(f"the weight of a {kind} is not finite; train again from a finite checkpoint")
    transposed = getattr(layer, "transposed", False)
    quantizer = Quantizer(weights, axis=1 if transposed else 0).to(weight)
    quantizer.calibrate(weight)
    layer.__class__ = _class_of(type(layer))
    layer.weight_quantizer = quantizer
    layer.input_quantizer = None if inputs is None else Quantizer(inputs, axis=1).to(weight)
    layer.active, layer.frozen = True, False


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Return the quantized layers of a model by name, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}


def plain_layer(layer: QuantizedLayer, weight: Tensor) -> nn.Module:
    """Return the layer that `layer` was, without bias, with another weight."""
    plain = copy.deepcopy(layer)
    for name in ("weight_quantizer", "input_quantizer"):
        plain._modules.pop(name, None)
    plain.__class__ = type(layer).__mro__[2]
    plain._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    plain._parameters["bias"] = None
    return plain


def freeze(model: M) -> M:
    """Return a copy whose quantized layers hold their rounded weights, and codes of k bits in its state dict."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for layer in quantized_layers(model).values():
            weight = layer._parameters["weight"]
            assert weight is not None
            if layer.weight_quantizer.scheme.dynamic:
                still = replace(layer.weight_quantizer.scheme, dynamic=False)
                layer.weight_quantizer = Quantizer(still, layer.weight_quantizer.axis).to(weight)
                layer.weight_quantizer.calibrate(weight)
            for quantizer in (layer.weight_quantizer, layer.input_quantizer):
                if quantizer is not None:
                    quantizer.fix_scale()
            weight.copy_(layer.weight_quantizer.decode(layer.weight_quantizer.encode(weight)))
            layer.frozen = True
    return model
