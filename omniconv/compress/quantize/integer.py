"""Inference in whole numbers alone: between layers a multiplication and a shift take the place of the scales.

Papers: Jacob et al., https://arxiv.org/abs/1712.05877; dyadic numbers, HAWQ-V3, https://arxiv.org/abs/2011.10680.
It is a reference, for chains of layers; integer kernels are the runtimes' part (`omniconv.deploy.int8`).
"""

import copy
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from omniconv.compress.quantize.formats import Integer
from omniconv.compress.quantize.layers import QuantizedLayer, plain_layer
from omniconv.compress.quantize.quantizer import Quantizer

__all__ = ["IntegerNetwork", "dyadic", "integer_network", "requantize"]

_DYADIC_BITS = 24
_PASSES = (nn.Identity, nn.Dropout, nn.ReLU, nn.Flatten, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)


def dyadic(factor: Tensor, bits: int = _DYADIC_BITS) -> tuple[Tensor, Tensor]:
    r"""Return whole numbers (m, n), m odd and below :math:`2^{bits}`, with :math:`m / 2^n` close to `factor`.

    As m is odd, :math:`a m / 2^n` lies half-way between whole numbers for no :math:`|a| < 2^{n-1}`, so no two
    conventions of rounding differ.

    Args:
        factor: positive.
        bits: of m.
    """
    fraction, exponent = torch.frexp(factor.double())
    return (fraction * 2**bits).floor().long() | 1, bits - exponent.long()


def requantize(sums: Tensor, m: Tensor, n: Tensor) -> Tensor:
    r"""Return :math:`\mathrm{round}(a m / 2^n)` of the sums a, with a product, an addition and a shift."""
    return (sums * m + (1 << (n - 1))) >> n


@dataclass(frozen=True)
class _Stage:
    """One layer and what follows it, in whole numbers.

    Attributes:
        layer: with the codes as its weight, in float64, which holds their sums exactly.
        bias: added to the sums.
        zero: zero point of the input.
        scale: (m, n), from the sums to the next layer's codes; None behind the last layer.
        unit: what one of the sums stands for.
        passes: modules up to the next layer, which only choose between codes.
    """

    layer: nn.Module
    bias: Tensor
    zero: Tensor
    scale: tuple[Tensor, Tensor] | None
    unit: Tensor
    passes: tuple[nn.Module, ...]

    def along(self, values: Tensor, like: Tensor) -> Tensor:
        """Return values of the channels so that they broadcast."""
        return values if isinstance(self.layer, nn.Linear) else values.reshape(-1, *(1,) * (like.ndim - 2))

    def sums(self, codes: Tensor) -> Tensor:
        """Return the int64 sums of products of codes."""
        sums = self.layer((codes - self.zero).double()).long()
        return sums + self.along(self.bias, sums)


class IntegerNetwork:
    """A chain of layers that computes in whole numbers from the input's codes to the last sums.

    `integer_network` makes it. Sums fit in 32 bits, and their products with multipliers in 64.
    """

    def __init__(self, source: Quantizer, stages: list[_Stage], inputs: list[Quantizer]) -> None:
        self.source, self.stages, self.inputs = source, stages, inputs

    def codes(self, x: Tensor) -> list[Tensor]:
        """Return the codes that every layer takes in, int64, for float inputs (N, C, ...)."""
        codes = [_whole(self.source, x.double())]
        for stage, target in zip(self.stages, self.inputs, strict=False):
            sums = stage.sums(codes[-1])
            assert stage.scale is not None
            m, n = (stage.along(part, sums) for part in stage.scale)
            zero, low, high = (int(v) for v in (target.zero, target.grid[0], target.grid[-1]))
            value = (requantize(sums, m, n) + zero).clamp(low, high)
            for module in stage.passes:
                # Scales are positive, so the largest code is that of the largest number.
                value = (
                    value.clamp(min=zero) if isinstance(module, nn.ReLU) else module(value.double()).long()
                )
            codes.append(value)
        return codes

    def __call__(self, x: Tensor) -> Tensor:
        """Return the output of the chain, float64, for float inputs (N, C, ...)."""
        last = self.stages[-1]
        sums = last.sums(self.codes(x)[-1])
        output = sums * last.along(last.unit, sums)
        for module in last.passes:
            output = module(output)
        return output


def _whole(quantizer: Quantizer, x: Tensor) -> Tensor:
    """Return the whole numbers of an `Integer` format, rather than indices of its grid."""
    return quantizer.encode(x) + quantizer.grid[0].long()


def _check(chain: nn.Sequential) -> None:
    for name, module in chain.named_children():
        if not isinstance(module, QuantizedLayer):
            if type(module) not in _PASSES:
                raise ValueError(
                    f"{name}: a {type(module).__name__} has no form in whole numbers here; leave it out"
                )
            continue
        weights, inputs = (
            module.weight_quantizer.scheme,
            module.input_quantizer and module.input_quantizer.scheme,
        )
        if not (isinstance(weights.format, Integer) and weights.symmetric and isinstance(weights.per, str)):
            raise ValueError(
                f"{name}: weights must be symmetric integers by tensor or channel: got {weights}"
            )
        if (
            inputs is None
            or inputs.dynamic
            or not isinstance(inputs.format, Integer)
            or inputs.per != "tensor"
        ):
            raise ValueError(f"{name}: inputs must be integers with one static range: got {inputs}")


def integer_network(chain: nn.Sequential) -> tuple[IntegerNetwork, nn.Sequential]:
    r"""Return a fake-quantized chain in whole numbers, and the fake-quantized chain that it equals bit for bit.

    .. math:: q_{l+1} = \mathrm{clip}\!\left( \mathrm{round}\!\left( \frac{m}{2^n} \Big( \sum q_w (q_l - z_l)
              + q_b \Big) \right) + z_{l+1} \right), \quad \frac{m}{2^n} = \frac{s_l s_w}{s_{l+1}}

    The second is a copy of the chain in float64 whose weight scales and biases are what whole numbers can express:
    scales move by less than :math:`2^{-22}` of themselves, biases to multiples of :math:`s_l s_w`.

    Args:
        chain: of quantized layers (`fake_quantize`, with folded batch norms), ReLU, max pooling and flattening; it
            stays as it is.

    Raises:
        ValueError: if the chain holds another module, or a layer is not quantized to integers with static ranges.
    """
    _check(chain)
    chain = copy.deepcopy(chain).double().eval()
    modules = list(chain)
    places = [place for place, module in enumerate(modules) if isinstance(module, QuantizedLayer)]
    if not places or places[0] != 0:
        raise ValueError("the chain must begin with a quantized layer; see fake_quantize")
    layers = [cast(QuantizedLayer, modules[place]) for place in places]
    inputs = [cast(Quantizer, layer.input_quantizer) for layer in layers]
    stages = []
    with torch.no_grad():
        for layer, source, target, place, end in zip(
            layers, inputs, [*inputs[1:], None], places, [*places[1:], len(modules)], strict=True
        ):
            weight, quantizer = cast(Tensor, layer._parameters["weight"]), layer.weight_quantizer
            values = _whole(quantizer, weight)
            scale = None
            if target is not None:
                m, n = dyadic((source.scale * quantizer.scale / target.scale).flatten())
                quantizer.scale = (m.double() / 2.0**n)[:, None] * target.scale / source.scale
                scale = m, n
            weight.copy_(quantizer.decode(values - quantizer.grid[0].long()))
            channels = len(layer._parameters["bias"]) if layer._parameters["bias"] is not None else 1
            unit = (source.scale * quantizer.scale).flatten()
            unit = unit.expand(channels) if len(unit) == 1 else unit
            bias = torch.zeros_like(unit)
            if (given := layer._parameters["bias"]) is not None:
                bias = (given / unit).round()
                given.copy_(bias * unit)
            whole = plain_layer(layer, values.double())
            passes = tuple(modules[place + 1 : end])
            stages.append(_Stage(whole, bias.long(), source.zero.long().flatten(), scale, unit, passes))
    return IntegerNetwork(inputs[0], stages, inputs[1:]), chain
