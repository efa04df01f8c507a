"""What a layer's quantization costs: measured with that layer alone, or from the curvature of the loss."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from omniconv.compress.quantize.layers import QuantizedLayer, quantized_layers
from omniconv.compress.quantize.quantize import fake_quantize
from omniconv.compress.quantize.quantizer import WEIGHTS, Quantizer, Scheme, as_scheme
from omniconv.compress.report import weight_layers
from omniconv.core.seeds import generator

__all__ = ["Sensitivity", "alone", "divergence", "hessian_costs", "hessian_traces", "sensitivity"]


@dataclass(frozen=True)
class Sensitivity:
    """What every choice of bits costs in every layer, as `allocate` and `frontier` take it.

    Attributes:
        names: of the layers.
        choices: bits or schemes of the weight, the same for all layers.
        costs: layers by choices.
        sizes: bits of the weight, layers by choices.
    """

    names: tuple[str, ...]
    choices: tuple[int | Scheme, ...]
    costs: tuple[tuple[float, ...], ...]
    sizes: tuple[tuple[int, ...], ...]

    def chosen(self, indices: Sequence[int]) -> dict[str, int | Scheme]:
        """Return the layers' bits, as `quantize` takes them, for an allocation's choices."""
        return {name: self.choices[index] for name, index in zip(self.names, indices, strict=True)}


def _sizes(
    model: nn.Module, names: Sequence[str], choices: Sequence[int | Scheme]
) -> tuple[tuple[int, ...], ...]:
    layers = weight_layers(model)
    bits = [as_scheme(choice, WEIGHTS).format.bits for choice in choices]
    return tuple(tuple(layers[name].weight.numel() * b for b in bits) for name in names)


def alone(model: nn.Module, measure: Callable[[nn.Module], float]) -> dict[str, float]:
    """Return what `measure` says of a fake-quantized model while one layer alone is quantized, by layer."""
    layers = quantized_layers(model)
    found = {}
    try:
        _activate(layers.values(), False)
        for name, layer in layers.items():
            layer.active = True
            found[name] = float(measure(model))
            layer.active = False
    finally:
        _activate(layers.values(), True)
    return found


def _activate(layers: Iterable[QuantizedLayer], active: bool) -> None:
    for layer in layers:
        layer.active = active


def sensitivity(
    model: nn.Module,
    measure: Callable[[nn.Module], float],
    choices: Sequence[int | Scheme] = (2, 4, 8),
    images: Tensor | None = None,
    *,
    activations: int | Scheme | None = None,
) -> Sensitivity:
    """Measure what quantizing each layer alone does, for every choice of its weight's bits.

    Args:
        model: in float; it stays as it is.
        measure: of a model, where more is worse: `divergence`, or the loss on some images less that in float.
        choices: bits or schemes.
        images: to calibrate activations with.
        activations: bits or scheme of the layer's input; None leaves it in float.
    """
    columns = [
        alone(fake_quantize(model, images, weights=choice, activations=activations), measure)
        for choice in choices
    ]
    names = tuple(columns[0])
    costs = tuple(tuple(column[name] for column in columns) for name in names)
    return Sensitivity(names, tuple(choices), costs, _sizes(model, names, choices))


def divergence(model: nn.Module, images: Tensor) -> Callable[[nn.Module], float]:
    r"""Return the measure of `ZeroQ <https://arxiv.org/abs/2001.00281>`_: how far another model's answers are off.

    .. math:: \frac{1}{N} \sum_j \mathrm{KL}\!\left( \mathrm{softmax}\, f(x_j) \,\|\, \mathrm{softmax}\, \hat f(x_j)
              \right)

    Args:
        model: in float, put in eval mode while it answers.
        images: inputs (N, ...); outputs are logits (N, K).
    """

    def answers(network: nn.Module) -> Tensor:
        training = network.training
        with torch.no_grad():
            output = network.eval()(images).double().log_softmax(1)
        network.train(training)
        return output

    wanted = answers(model)

    def measure(other: nn.Module) -> float:
        return float((wanted.exp() * (wanted - answers(other))).sum(1).mean())

    return measure


def hessian_traces(
    model: nn.Module, loss: Callable[[nn.Module], Tensor], *, probes: int = 16, seed: int = 0
) -> dict[str, float]:
    r"""Return the traces of the loss's second derivatives by each layer's weight, estimated as Hutchinson does.

    .. math:: \mathrm{tr}\, H = \mathbb{E}_v[v^\top H v], \quad v_i = \pm 1

    (`HAWQ-V2 <https://arxiv.org/abs/1911.03852>`_)

    Args:
        model: in float; it stays as it is, in its mode.
        loss: of a model on one batch.
        probes: random vectors.
        seed: of them.
    """
    weights = {name: layer.weight for name, layer in weight_layers(model).items()}
    gradients = torch.autograd.grad(loss(model), list(weights.values()), create_graph=True)
    random = generator(seed, "hutchinson")
    totals = [0.0] * len(gradients)
    for _ in range(probes):
        signs = [(torch.randint(2, g.shape, generator=random).to(g) * 2 - 1) for g in gradients]
        products = torch.autograd.grad(
            gradients, list(weights.values()), signs, retain_graph=True, materialize_grads=True
        )
        for index, (sign, product) in enumerate(zip(signs, products, strict=True)):
            totals[index] += float((sign * product).sum()) / probes
    return dict(zip(weights, totals, strict=True))


def hessian_costs(
    model: nn.Module, traces: dict[str, float], choices: Sequence[int | Scheme] = (2, 4, 8)
) -> Sensitivity:
    r"""Return the costs of `HAWQ-V2 <https://arxiv.org/abs/1911.03852>`_: curvature times squared rounding error.

    .. math:: \Omega_l = \frac{\mathrm{tr}\, H_l}{n_l} \, \lVert Q(W_l) - W_l \rVert^2

    Args:
        model: in float.
        traces: by layer, of `hessian_traces`.
        choices: bits or schemes of the weights.
    """
    layers = weight_layers(model)
    rows = []
    for name, trace in traces.items():
        weight = layers[name].weight.detach()
        row = []
        for choice in choices:
            quantizer = Quantizer(as_scheme(choice, WEIGHTS)).to(weight)
            quantizer.calibrate(weight)
            row.append(trace / weight.numel() * float((quantizer(weight) - weight).square().sum()))
        rows.append(tuple(row))
    return Sensitivity(tuple(traces), tuple(choices), tuple(rows), _sizes(model, tuple(traces), choices))
