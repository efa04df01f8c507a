"""Corrections of a quantized model by a few images: biases, channel statistics, and the outputs as a teacher's.

Bias correction: Nagel et al., https://arxiv.org/abs/1906.04721. Re-estimated batch-norm statistics: Hubara et al.,
https://arxiv.org/abs/2006.10518.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.compress.quantize.layers import QuantizedLayer, quantized_layers

__all__ = ["correct_bias", "distil", "layer_io", "run_order", "standardize"]

_BATCH = 64


class _Reached(Exception):
    """Ends a forward pass at the layer that is asked for."""


def layer_io(model: nn.Module, name: str, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the input and the output of the layer `name` for `images`; nothing behind it runs."""
    inputs, outputs = [], []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        inputs.append(args[0])
        outputs.append(output)
        raise _Reached

    handle = model.get_submodule(name).register_forward_hook(hook)
    try:
        with torch.no_grad():
            for batch in images.split(_BATCH):
                try:
                    model(batch)
                except _Reached:
                    pass
    finally:
        handle.remove()
    return torch.cat(inputs), torch.cat(outputs)


def run_order(model: nn.Module, images: Tensor) -> list[str]:
    """Return the names of the quantized layers in the order in which a forward pass first calls them."""
    order: dict[str, None] = {}

    def visit(name: str, layer: nn.Module, output: Tensor) -> None:
        order[name] = None

    _forward(model, images[:1], quantized_layers(model), visit)
    return list(order)


def _forward(
    model: nn.Module, images: Tensor, names: Iterable[str], visit: Callable[[str, Any, Tensor], Tensor | None]
) -> None:
    """Run all images as one batch; `visit` sees every output of the layers, and may return another."""

    def watch(name: str) -> Callable[..., Tensor | None]:
        return lambda layer, args, output: visit(name, layer, output)

    hooks = [model.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()


def _moments(layer: nn.Module, output: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of every output channel."""
    channels = output.movedim(-1 if isinstance(layer, nn.Linear) else 1, 0).flatten(1)
    return channels.mean(1), channels.std(1, correction=0)


def _along_channels(layer: nn.Module, values: Tensor, output: Tensor) -> Tensor:
    return values if isinstance(layer, nn.Linear) else values.reshape(-1, *(1,) * (output.ndim - 2))


def _reference_moments(
    model: nn.Module, reference: nn.Module, images: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    moments: dict[str, tuple[Tensor, Tensor]] = {}

    def visit(name: str, layer: nn.Module, output: Tensor) -> None:
        moments[name] = _moments(layer, output)

    _forward(reference, images, quantized_layers(model), visit)
    return moments


def _shift(layer: QuantizedLayer, shift: Tensor) -> None:
    bias = layer._parameters.get("bias")
    layer.bias = nn.Parameter((shift if bias is None else bias + shift).detach())


def correct_bias(model: nn.Module, reference: nn.Module, images: Tensor) -> None:
    r"""Move the biases so that every channel has the mean that it has in float, layer after layer, in place.

    .. math:: b \leftarrow b + \mathbb{E}[W * x + b] - \mathbb{E}[Q(W) * Q(\hat x) + b]

    Args:
        model: fake-quantized, in eval mode.
        reference: the float model with the same layers; `fold_batch_norms` of it where the model was folded.
        images: inputs (N, ...), run as one batch.
    """
    wanted = _reference_moments(model, reference, images)

    def visit(name: str, layer: QuantizedLayer, output: Tensor) -> Tensor:
        shift = wanted[name][0] - _moments(layer, output)[0]
        _shift(layer, shift)
        return output + _along_channels(layer, shift, output)

    _forward(model, images, list(wanted), visit)


def standardize(model: nn.Module, reference: nn.Module, images: Tensor) -> None:
    r"""Give every channel the mean and the variance that it has in float, layer after layer, in place.

    It is what re-estimating the statistics of a batch norm behind each layer, and folding it again, would do; the
    codes of the weights stay:

    .. math:: s_w \leftarrow g\, s_w, \quad b \leftarrow g\,(b - \hat\mu) + \mu, \quad g = \sigma / \hat\sigma

    Args:
        model: fake-quantized, in eval mode, with weights quantized by channel or group.
        reference: the float model with the same layers.
        images: inputs (N, ...), run as one batch.

    Raises:
        ValueError: if a weight has one range for the whole tensor.
    """
    for name, layer in quantized_layers(model).items():
        if layer.weight_quantizer.scheme.per == "tensor":
            raise ValueError(f"{name}: channels need steps of their own; quantize weights with per='channel'")
    wanted = _reference_moments(model, reference, images)

    def visit(name: str, layer: QuantizedLayer, output: Tensor) -> Tensor:
        (mean, deviation), (found, spread) = wanted[name], _moments(layer, output)
        # A dead channel has no scale to correct.
        gain = torch.where((spread > 1e-6) & (deviation > 1e-6), deviation / spread, 1)
        gain = _rescale(layer, gain)
        shift = mean - gain * found
        _shift(layer, shift)
        return output * _along_channels(layer, gain, output) + _along_channels(layer, shift, output)

    _forward(model, images, list(wanted), visit)


def _rescale(layer: QuantizedLayer, gain: Tensor) -> Tensor:
    """Multiply the output by `gain` without changing a code; return what it was multiplied by."""
    quantizer, weight, bias = (
        layer.weight_quantizer,
        layer._parameters["weight"],
        layer._parameters.get("bias"),
    )
    assert weight is not None
    ranges = weight.shape[quantizer.axis]
    # The groups of a transposed convolution share the range of a channel.
    shared = gain.reshape(-1, ranges).mean(0)
    shape = [1] * weight.ndim
    shape[quantizer.axis] = ranges
    weight.mul_(shared.reshape(shape))
    quantizer.scale.mul_(shared.repeat_interleave(len(quantizer.scale) // ranges)[:, None])
    gain = shared.repeat(len(gain) // ranges)
    if bias is not None:
        bias.mul_(gain)
    return gain


def distil(
    model: nn.Module,
    reference: nn.Module,
    images: Tensor,
    parameters: Iterable[nn.Parameter],
    *,
    steps: int,
    lr: float,
    batch: int = 32,
    seed: int = 0,
) -> None:
    """Train parameters of a fake-quantized model to give the outputs of the float one, in place, without labels.

    Args:
        model: fake-quantized; its mode stays.
        reference: the float model, in eval mode. For classifiers both give logits, whose KL divergence is the loss;
            any other output is compared by its squared error.
        images: inputs (N, ...).
        parameters: what to train, such as the biases.
        steps: of Adam, with a cosine schedule.
        lr: first learning rate.
        batch: images a step.
        seed: of their order.
    """
    with torch.no_grad():
        wanted = torch.cat([reference(part) for part in images.split(_BATCH)])

    def loss(chosen: Tensor) -> Tensor:
        output = model(images[chosen])
        if output.ndim != 2:
            return F.mse_loss(output, wanted[chosen])
        target = wanted[chosen].log_softmax(1)
        return F.kl_div(output.log_softmax(1), target, reduction="batchmean", log_target=True)

    fit([{"params": list(parameters), "lr": lr}], loss, len(images), steps=steps, batch=batch, seed=seed)


def fit(
    groups: list[dict[str, Any]],
    loss: Callable[[Tensor], Tensor],
    count: int,
    *,
    steps: int,
    batch: int,
    seed: int,
) -> None:
    """Minimise `loss` of random indices below `count` with Adam and a cosine schedule; no gradient is left behind."""
    parameters = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    random = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(count, (min(batch, count),), generator=random)
        for p, gradient in zip(parameters, torch.autograd.grad(loss(chosen), parameters), strict=True):
            p.grad = gradient
        optimizer.step()
        schedule.step()
    for p in parameters:
        p.grad = None
