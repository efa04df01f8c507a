"""AdaQuant: each layer's weights and steps are moved until the quantized layer gives the float one's outputs.

Paper: Hubara et al., Improving Post Training Neural Quantization: Layer-wise Calibration and Integer Programming,
https://arxiv.org/abs/2006.10518. The bits of the layers come from `sensitivity` and `allocate`; the re-estimated
batch norms are `standardize`, whose targets are the float layers' own moments on the calibration images, so that
layers without a batch norm have them too.
"""

from typing import TypeVar

import torch
from torch import Tensor, nn

from omniconv.compress.quantize.correct import distil, fit, layer_io, run_order, standardize
from omniconv.compress.quantize.layers import QuantizedLayer, quantized_layers
from omniconv.compress.quantize.quantize import Bits, fake_quantize, finish
from omniconv.compress.report import CompressionReport
from omniconv.layers.conv.norm_folding import fold_batch_norms

__all__ = ["adapt_layer", "adaquant"]

M = TypeVar("M", bound=nn.Module)

_BATCH = 32


def adapt_layer(
    layer: QuantizedLayer, inputs: Tensor, wanted: Tensor, *, steps: int = 200, seed: int = 0
) -> tuple[float, float]:
    r"""Move weight, bias and both steps of a quantized layer towards wanted outputs, in place.

    .. math:: \min_{V, s_w, s_x, b} \lVert Y - Q_{s_w}(W + V) * Q_{s_x}(X) - b \rVert^2

    with gradients straight through the rounding. Where it does not help the layer stays as it was.

    Args:
        layer: fake-quantized.
        inputs: X, not yet quantized.
        wanted: Y.
        steps: of Adam, with a cosine schedule.
        seed: of the order of images.

    Returns:
        The mean squared error before and after.
    """

    def error() -> float:
        with torch.no_grad():
            pairs = zip(inputs.split(_BATCH), wanted.split(_BATCH), strict=True)
            return float(sum((layer(x) - y).square().sum() for x, y in pairs)) / wanted.numel()

    before, kept = error(), {name: value.clone() for name, value in layer.state_dict().items()}
    quantizers = [q for q in (layer.weight_quantizer, layer.input_quantizer) if q and not q.scheme.dynamic]
    weight, bias = layer._parameters["weight"], layer._parameters.get("bias")
    assert weight is not None
    step = float(layer.weight_quantizer.scale.mean())
    groups = [{"params": [weight], "lr": 0.05 * step}]
    for quantizer in quantizers:
        lr = 0.01 * float(quantizer.scale.mean())
        quantizer.learn_scale()
        groups.append({"params": [quantizer.scale], "lr": lr})
    if bias is not None:
        groups.append({"params": [bias], "lr": 0.01 * float(wanted.std())})
    fit(
        groups,
        lambda chosen: (layer(inputs[chosen]) - wanted[chosen]).square().mean() / wanted.var().clamp(min=1e-12),
        len(inputs), steps=steps, batch=_BATCH, seed=seed,
    )  # fmt: skip
    for quantizer in quantizers:
        quantizer.fix_scale()
    after = error()
    if after >= before:
        layer.load_state_dict(kept)
        after = before
    return before, after


def adaquant(
    model: M,
    images: Tensor,
    *,
    weights: Bits = 4,
    activations: Bits | None = 4,
    steps: int = 200,
    sequential: bool = True,
    seed: int = 0,
    input_shape: tuple[int, ...] | None = None,
) -> tuple[M, CompressionReport]:
    """Quantize layer by layer with a small unlabelled set (`AdaQuant <https://arxiv.org/abs/2006.10518>`_).

    The paper's pipelines: calibrated ranges and channel statistics put right (light, `steps=0`); before that
    `adapt_layer` for every layer, and after it biases that are trained to give the float model's answers (advanced).

    Args:
        model: any module; it stays as it is.
        images: some hundred inputs (N, ...), without labels; run as one batch where statistics are put right.
        weights: bits or schemes, for all layers or by layer; steps by channel, as an integer means.
        activations: bits or schemes of the layers' inputs; None leaves them in float.
        steps: of Adam, a layer.
        sequential: layers see the inputs that the quantized layers before them give; else those in float, so that
            an error does not add up but is not mended either.
        seed: of the order of images.
        input_shape: of one sample; the report counts operations if it is given.

    Raises:
        ValueError: as of `quantize`, or if a weight has one range for the whole tensor.
    """
    reference = fold_batch_norms(model)
    result = fake_quantize(model, images, weights=weights, activations=activations)
    if steps:
        for name in run_order(result, images):
            layer = result.get_submodule(name)
            assert isinstance(layer, QuantizedLayer)
            inputs, wanted = layer_io(reference, name, images)
            if sequential:
                inputs = layer_io(result, name, images)[0]
            adapt_layer(layer, inputs, wanted, steps=steps, seed=seed)
    standardize(result, reference, images)
    if steps:
        biases = [
            bias
            for layer in quantized_layers(result).values()
            if (bias := layer._parameters["bias"]) is not None
        ]
        distil(result, reference, images, biases, steps=steps, lr=1e-4, seed=seed)
    return finish("AdaQuant", model, result, input_shape)
