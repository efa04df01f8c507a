"""Quantization of any model: fake-quantized to calibrate or train it, then frozen to codes of k bits.

Paper: Gholami et al., A Survey of Quantization Methods for Efficient Neural Network Inference,
https://arxiv.org/abs/2103.13630.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from omniconv.compress.quantize.layers import freeze, quantize_layer, quantized_layers
from omniconv.compress.quantize.quantizer import ACTIVATIONS, WEIGHTS, Scheme, as_scheme
from omniconv.compress.report import CompressionReport, compare, weight_layers
from omniconv.core.config import closest
from omniconv.design.cost import layer_macs
from omniconv.layers.conv.norm_folding import fold_batch_norms

__all__ = ["Bits", "bit_operations", "calibrate", "fake_quantize", "quantize"]

M = TypeVar("M", bound=nn.Module)
Bits = int | Scheme | Mapping[str, int | Scheme]
"""Bits or a scheme for all layers, or one for each layer by name; a layer that is not named stays in float."""

_BATCH = 64
_FLOAT = 32


def _by_layer(names: list[str], bits: Bits | None, default: Scheme, what: str) -> dict[str, Scheme]:
    if bits is None:
        return {}
    if not isinstance(bits, Mapping):
        return {name: as_scheme(bits, default) for name in names}
    for name in bits:
        if name not in names:
            hint = closest(name, names)
            raise ValueError(f"{what}: {name!r} is no convolution or linear layer of this model{hint}")
    return {name: as_scheme(chosen, default) for name, chosen in bits.items()}


def fake_quantize(
    model: M,
    images: Tensor | None = None,
    *,
    weights: Bits = 8,
    activations: Bits | None = 8,
    fold: bool = True,
    learn_scales: bool = False,
) -> M:
    """Return a copy that computes in float with rounded weights and inputs, to be calibrated, measured or trained.

    Gradients pass the rounding, so quantization-aware training is training this copy; `freeze` ends it.

    Args:
        model: any module; it stays as it is.
        images: inputs (N, ...) from whose statistics static ranges of activations are taken.
        weights: of the convolutions and linear layers; an integer means `WEIGHTS` in so many bits.
        activations: of the inputs of the same layers; an integer means `ACTIVATIONS` in so many bits; None leaves
            them in float.
        fold: fold batch norms into the convolutions before them first; the copy is then in eval mode.
        learn_scales: make the steps parameters (LSQ).

    Raises:
        ValueError: if a layer is not there, its weight is no finite plain parameter, or ranges are static and there
            are no images.
    """
    result = fold_batch_norms(model) if fold else copy.deepcopy(model)
    names = list(weight_layers(result))
    chosen = _by_layer(names, weights, WEIGHTS, "weights")
    inputs = {
        k: v for k, v in _by_layer(names, activations, ACTIVATIONS, "activations").items() if k in chosen
    }
    if images is None and any(not scheme.dynamic for scheme in inputs.values()):
        raise ValueError("static ranges of activations need images; pass some, or activations=None")
    for name, scheme in chosen.items():
        quantize_layer(result.get_submodule(name), scheme, inputs.get(name))
    if images is not None:
        calibrate(result, images)
    if learn_scales:
        for layer in quantized_layers(result).values():
            layer.weight_quantizer.learn_scale()
            if layer.input_quantizer is not None and not layer.input_quantizer.scheme.dynamic:
                layer.input_quantizer.learn_scale()
    return result


def calibrate(model: nn.Module, images: Tensor) -> None:
    """Set the static ranges of all quantized inputs from what they are while nothing is rounded, in place.

    A layer that is not called by `forward`, as the last one of `nn.MultiheadAttention`, keeps its input in float.
    """
    layers = quantized_layers(model)
    ranges: dict[str, tuple[Tensor, Tensor]] = {}
    last: dict[str, Tensor] = {}

    def observe(name: str) -> Callable[..., None]:
        def hook(layer: Any, args: tuple[Any, ...]) -> None:
            low, high = layer.input_quantizer.find_range(args[0])
            if name in ranges:
                low, high = ranges[name][0].minimum(low), ranges[name][1].maximum(high)
            ranges[name], last[name] = (low, high), args[0]

        return hook

    hooks = [
        layer.register_forward_pre_hook(observe(name))
        for name, layer in layers.items()
        if layer.input_quantizer is not None and not layer.input_quantizer.scheme.dynamic
    ]
    training = model.training
    try:
        for layer in layers.values():
            layer.active = False
        model.eval()
        with torch.no_grad():
            for batch in images.split(_BATCH):
                model(batch)
    finally:
        model.train(training)
        for layer in layers.values():
            layer.active = True
        for hook in hooks:
            hook.remove()
    for name, layer in layers.items():
        quantizer = layer.input_quantizer
        if quantizer is not None and not quantizer.scheme.dynamic:
            if name in ranges:
                quantizer.calibrate(last[name], *ranges[name])
            else:
                layer.input_quantizer = None


def bit_operations(model: nn.Module, input_shape: tuple[int, ...]) -> int:
    r"""Return the bit operations of one sample, :math:`\sum_l \mathrm{MAC}_l\, b_{w,l}\, b_{a,l}`; float has 32 bits.

    Args:
        model: of which the convolutions and linear layers are counted, quantized or not.
        input_shape: of one sample.
    """
    macs, quantized = layer_macs(model, input_shape), quantized_layers(model)
    total = 0
    for name in weight_layers(model):
        layer = quantized.get(name)
        weight = layer.weight_quantizer.bits if layer else _FLOAT
        inputs = layer.input_quantizer.bits if layer and layer.input_quantizer else _FLOAT
        total += macs.get(name, 0) * weight * inputs
    return total


def finish(
    method: str, before: nn.Module, model: M, input_shape: tuple[int, ...] | None = None
) -> tuple[M, CompressionReport]:
    """Freeze a fake-quantized model and report what became of `before`.

    Args:
        method: name of the transform, for the report.
        before: the model that went in.
        model: fake-quantized; it stays as it is.
        input_shape: of one sample; the report counts operations if it is given.
    """
    frozen = freeze(model)
    layers = quantized_layers(frozen)
    widths = sorted({layer.weight_quantizer.bits for layer in layers.values()})
    notes = [
        f"{len(layers)} layers have weights of {', '.join(map(str, widths))} bits, held as codes in "
        "the state dict and computed with in float; quantize_int8 makes a file that runs in integers."
    ]
    plain = [name for name, layer in layers.items() if layer.input_quantizer is None]
    if plain and len(plain) < len(layers):
        notes.append(f"The inputs of {', '.join(plain)} stay in float.")
    if input_shape is not None:
        old, new = bit_operations(before, input_shape), bit_operations(frozen, input_shape)
        notes.append(f"Bit operations: {old:,} before, {new:,} after.")
    return frozen, compare(method, before, frozen, input_shape=input_shape, notes=tuple(notes))


def quantize(
    model: M,
    images: Tensor | None = None,
    *,
    weights: Bits = 8,
    activations: Bits | None = 8,
    fold: bool = True,
    input_shape: tuple[int, ...] | None = None,
) -> tuple[M, CompressionReport]:
    r"""Quantize a model after training (`survey <https://arxiv.org/abs/2103.13630>`_).

    .. math:: y = Q_w(W) * Q_a(x) + b

    for every convolution and linear layer, with the quantizers of `weights` and `activations`. A weight of n
    entries then takes :math:`n k / 8` bytes in the state dict, and a scale a channel.

    Args:
        model: any module; it stays as it is.
        images: some hundred inputs (N, ...) to calibrate the activations with.
        weights: bits or scheme, for all layers or by layer.
        activations: bits or scheme of the layers' inputs; None leaves them in float.
        fold: fold batch norms into the convolutions before them first.
        input_shape: of one sample, for example (3, 224, 224); the report counts operations if it is given.

    Returns:
        The quantized copy and the report.

    Raises:
        ValueError: if a layer is not there, its weight is no finite plain parameter, or ranges are static and there
            are no images.
    """
    result = fake_quantize(model, images, weights=weights, activations=activations, fold=fold)
    return finish("post-training quantization", model, result, input_shape)
