"""Adaptive rounding: up or down is learned for every weight from the layer's output, not taken from the nearest.

Paper: Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization,
https://arxiv.org/abs/2004.10568.
"""

from typing import TypeVar

import torch
from torch import Tensor, nn

from omniconv.compress.quantize.correct import fit, layer_io, run_order
from omniconv.compress.quantize.formats import Integer
from omniconv.compress.quantize.layers import QuantizedLayer
from omniconv.compress.quantize.quantize import Bits, fake_quantize, finish
from omniconv.compress.report import CompressionReport
from omniconv.layers.conv.norm_folding import fold_batch_norms

__all__ = ["adaround"]

M = TypeVar("M", bound=nn.Module)

# The rectified sigmoid of the paper: it reaches 0 and 1.
_LOW, _HIGH = -0.1, 1.1


def adaround(
    model: M,
    images: Tensor,
    *,
    weights: Bits = 4,
    activations: Bits | None = 8,
    steps: int = 300,
    lr: float = 1e-2,
    seed: int = 0,
    input_shape: tuple[int, ...] | None = None,
) -> tuple[M, CompressionReport]:
    r"""Quantize with learned rounding (`AdaRound <https://arxiv.org/abs/2004.10568>`_), layer after layer.

    .. math:: \min_V \lVert W x - \tilde W \hat x \rVert^2 + \lambda \sum_i 1 - |2 h(V_i) - 1|^\beta, \quad
              \tilde W = s \left( \lfloor W / s \rfloor + h(V) \right)

    with h the sigmoid stretched to [-0.1, 1.1] and clipped to [0, 1]. The power falls from 20 to 2, which lets V
    move first and drives every h to 0 or 1 at last.

    Args:
        model: any module; it stays as it is.
        images: some hundred inputs (N, ...), without labels.
        weights: bits or schemes with `Integer` formats.
        activations: bits or schemes of the layers' inputs, which V sees; None leaves them in float.
        steps: of Adam, a layer.
        lr: of V.
        seed: of the order of images.
        input_shape: of one sample; the report counts operations if it is given.

    Raises:
        ValueError: as of `quantize`, or if a weight's format is no `Integer`.
    """
    reference = fold_batch_norms(model)
    result = fake_quantize(model, images, weights=weights, activations=activations)
    for name in run_order(result, images):
        layer = result.get_submodule(name)
        assert isinstance(layer, QuantizedLayer)
        if not isinstance(layer.weight_quantizer.scheme.format, Integer):
            raise ValueError(
                f"{name}: only whole numbers can be rounded up or down; choose an Integer format"
            )
        inputs, wanted = layer_io(result, name, images)[0], layer_io(reference, name, images)[1]
        if layer.input_quantizer is not None:
            with torch.no_grad():
                inputs = layer.input_quantizer(inputs)
        _learn(layer, reference.get_submodule(name), inputs, wanted, steps, lr, seed)
    return finish("AdaRound", model, result, input_shape)


def _learn(
    layer: QuantizedLayer, plain: nn.Module, inputs: Tensor, wanted: Tensor, steps: int, lr: float, seed: int
) -> None:
    """Put rounded weights in place of the layer's, so that its quantizer leaves them as they are."""
    weight = layer._parameters["weight"]
    assert weight is not None
    quantizer = layer.weight_quantizer
    rows = quantizer.rows(weight.detach()) / quantizer.scale + quantizer.zero
    floor = rows.floor()
    start = ((rows - floor) - _LOW) / (_HIGH - _LOW)
    v = nn.Parameter(start.logit())
    variance = wanted.var().clamp(min=1e-12)
    done = 0

    def rounding() -> Tensor:
        return (v.sigmoid() * (_HIGH - _LOW) + _LOW).clamp(0, 1)

    def rounded(up: Tensor) -> Tensor:
        codes = (floor + up).clamp(quantizer.grid[0], quantizer.grid[-1])
        return quantizer.restore((codes - quantizer.zero) * quantizer.scale, weight.shape)

    def loss(chosen: Tensor) -> Tensor:
        nonlocal done
        done += 1
        up = rounding()
        state = {"weight": rounded(up)}
        output = torch.func.functional_call(plain, state, (inputs[chosen],))
        error = (output - wanted[chosen]).square().mean() / variance
        share = done / steps
        if share < 0.2:  # the paper's warm-up, without the regulariser
            return error
        power = 2 + 18 * (1 - (share - 0.2) / 0.8)
        return error + 0.1 * (1 - (2 * up - 1).abs().pow(power)).mean()

    fit([{"params": [v], "lr": lr}], loss, len(inputs), steps=steps, batch=32, seed=seed)
    with torch.no_grad():
        weight.copy_(rounded((rounding() > 0.5).to(rows)))
