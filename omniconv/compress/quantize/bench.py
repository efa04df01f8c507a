"""The survey as a harness: any network, quantized in any of the ways, with its accuracy, size and bit operations.

Paper: Gholami et al., A Survey of Quantization Methods for Efficient Neural Network Inference,
https://arxiv.org/abs/2103.13630.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from omniconv.compress.quantize.formats import Binary, Codebook, Float, Integer, PowerOfTwo
from omniconv.compress.quantize.layers import quantized_layers
from omniconv.compress.quantize.quantize import Bits, bit_operations, quantize
from omniconv.compress.quantize.quantizer import ACTIVATIONS, Scheme

__all__ = ["TAXONOMY", "BenchRow", "bench", "weight_bytes"]


def _weights(bits: int, **choices: object) -> Scheme:
    return Scheme(Integer(bits), **{"per": "channel", "range": "mse", **choices})  # type: ignore[arg-type]


TAXONOMY: dict[str, tuple[Bits, Bits | None]] = {
    "int8": (8, 8),
    "int4 weights": (4, None),
    "int4 weights, one step a tensor": (_weights(4, per="tensor"), None),
    "int4 weights, a step for 32": (_weights(4, per=32), None),
    "int4 weights, asymmetric": (Scheme(Integer(4, signed=False), False, "channel", "mse"), None),
    "int4 weights, extremes": (_weights(4, range="minmax"), None),
    "int4 weights, entropy": (_weights(4, range="entropy"), None),
    "powers of two": (Scheme(PowerOfTwo(4), per="channel", range="mse"), None),
    "k-means of 16": (Scheme(Codebook(4)), None),
    "E2M1 weights": (Scheme(Float(2, 1), per="channel", range="mse"), None),
    "binary weights": (Scheme(Binary(), per="channel", range="mse"), None),
    "int8, dynamic": (8, Scheme(ACTIVATIONS.format, symmetric=False, dynamic=True)),
    "int4": (4, 4),
}
"""Ways to quantize, along the survey's axes: weights and activations as `quantize` takes them."""


@dataclass(frozen=True)
class BenchRow:
    """One way of quantizing a network.

    Attributes:
        name: of the way.
        score: as the caller measures it.
        bytes: of all weights and buffers in a file.
        bit_operations: of one sample.
    """

    name: str
    score: float
    bytes: int
    bit_operations: int


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes that the weights of a model's quantized layers and their scales take as packed codes."""
    total = 0
    for layer in quantized_layers(model).values():
        quantizer, weight = layer.weight_quantizer, layer._parameters["weight"]
        assert weight is not None
        total += -(-weight.numel() * quantizer.bits // 8)
        total += sum(value.numel() * value.element_size() for value in quantizer.state_dict().values())
    return total


def bench(
    model: nn.Module,
    images: Tensor,
    score: Callable[[nn.Module], float],
    ways: Mapping[str, tuple[Bits, Bits | None]] = TAXONOMY,
) -> list[BenchRow]:
    """Quantize a network in many ways and return what each costs and keeps, the float network first.

    Args:
        model: any module; it stays as it is.
        images: inputs (N, ...) to calibrate with.
        score: of a model, for example its accuracy.
        ways: weights and activations as `quantize` takes them, by name.
    """
    shape = tuple(images.shape[1:])
    rows = []
    for name, (weights, activations) in ways.items():
        quantized, report = quantize(model, images, weights=weights, activations=activations)
        if not rows:
            assert report.before.bytes is not None
            rows.append(BenchRow("float32", score(model), report.before.bytes, bit_operations(model, shape)))
        assert report.after.bytes is not None
        rows.append(BenchRow(name, score(quantized), report.after.bytes, bit_operations(quantized, shape)))
    return rows
