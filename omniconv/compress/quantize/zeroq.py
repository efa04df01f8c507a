"""ZeroQ: images made from a network's own batch-norm statistics calibrate it, and say how many bits each layer needs.

Paper: Cai et al., ZeroQ: A Novel Zero Shot Quantization Framework, https://arxiv.org/abs/2001.00281. No data, no
labels, no training.
"""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from omniconv.compress.quantize.allocate import frontier
from omniconv.compress.quantize.formats import Integer
from omniconv.compress.quantize.quantize import fake_quantize, finish
from omniconv.compress.quantize.quantizer import Scheme
from omniconv.compress.quantize.sensitivity import Sensitivity, divergence, sensitivity
from omniconv.compress.report import CompressionReport
from omniconv.core.seeds import generator

__all__ = ["distilled_images", "statistics_loss", "zeroq", "zeroq_scheme", "zeroq_sensitivity"]

M = TypeVar("M", bound=nn.Module)

_SIZES = 100_000


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    channels = x.transpose(0, 1).flatten(1)
    return channels.mean(1), channels.std(1, correction=0)


def statistics_loss(model: nn.Module, images: Tensor) -> Tensor:
    r"""Return how far the images are from the statistics that the batch norms keep.

    .. math:: \sum_l \frac{1}{C_l} \left( \lVert \mu_l(x) - \mu_l \rVert^2 + \lVert \sigma_l(x) - \sigma_l \rVert^2
              \right)

    with means and deviations of every batch norm's input, and of the images themselves, which are to have zero
    mean and unit variance.

    Args:
        model: in eval mode, with batch norms.
        images: inputs (N, C, ...).

    Raises:
        ValueError: if the model has no batch norm with running statistics.
    """
    mean, deviation = _moments(images)
    parts = [mean.square().mean() + (deviation - 1).square().mean()]

    def hook(norm: Any, args: tuple[Tensor, ...]) -> None:
        mean, deviation = _moments(args[0])
        wanted = norm.running_var.sqrt()
        parts.append((mean - norm.running_mean).square().mean() + (deviation - wanted).square().mean())

    norms = [
        m
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
    ]
    if not norms:
        raise ValueError("the model has no batch norm with running statistics; calibrate it with real images")
    hooks = [norm.register_forward_pre_hook(hook) for norm in norms]
    try:
        model(images)
    finally:
        for handle in hooks:
            handle.remove()
    return torch.stack(parts).sum()


def distilled_images(
    model: nn.Module,
    input_shape: tuple[int, ...],
    *,
    count: int = 32,
    steps: int = 500,
    lr: float = 0.1,
    seed: int = 0,
) -> Tensor:
    """Return `count` inputs that give a network's batch norms the statistics they were trained with.

    They start as Gaussian noise; `statistics_loss` is minimised by Adam with a cosine schedule.

    Args:
        model: with batch norms; it stays as it is.
        input_shape: of one sample, for example (3, 224, 224).
        count: of images.
        steps: of Adam.
        lr: first learning rate.
        seed: of the noise.
    """
    like = next(model.parameters())
    noise = torch.randn(count, *input_shape, generator=generator(seed, "zeroq"))
    images = noise.to(like).requires_grad_()
    optimizer = torch.optim.Adam([images], lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for _ in range(steps):
            (images.grad,) = torch.autograd.grad(statistics_loss(model, images), [images])
            optimizer.step()
            schedule.step()
    finally:
        for module, mode in training.items():
            module.training = mode
    return images.detach()


def zeroq(
    model: M,
    input_shape: tuple[int, ...],
    *,
    bits: float = 4.0,
    choices: tuple[int, ...] = (2, 4, 8),
    activations: int = 8,
    steps: int = 500,
    seed: int = 0,
) -> tuple[M, CompressionReport]:
    """Quantize without data, each layer in as many bits as it needs (`ZeroQ <https://arxiv.org/abs/2001.00281>`_).

    Of all allocations on the Pareto `frontier` of size and summed `divergence`, the best within the size is taken.

    Args:
        model: a classifier with batch norms; it stays as it is.
        input_shape: of one sample, for example (3, 224, 224).
        bits: of a weight, on average at most.
        choices: bits that a layer's weights may have.
        activations: bits of the layers' inputs.
        steps: of the distillation of images.
        seed: of their noise.

    Raises:
        ValueError: if the model has no batch norm, or even the least of `choices` is more than `bits`.
    """
    if min(choices) > bits:
        raise ValueError(f"bits must be at least the least of choices, {min(choices)}: got {bits}")
    images = distilled_images(model, input_shape, steps=steps, seed=seed)
    found = zeroq_sensitivity(model, images, choices)
    weights = sum(sizes[0] for sizes in found.sizes) / choices[0]
    best = [
        point for point in frontier(found.costs, found.sizes, unit=max(1.0, bits * weights / _SIZES))
        if point.size <= bits * weights
    ][-1]  # fmt: skip
    chosen = found.chosen(best.choices)
    return finish(
        "ZeroQ", model, fake_quantize(model, images, weights=chosen, activations=activations), input_shape
    )


def zeroq_scheme(bits: int) -> Scheme:
    """Return the paper's scheme of weights: asymmetric, by channel."""
    return Scheme(Integer(bits, signed=False), symmetric=False, per="channel")


def zeroq_sensitivity(model: nn.Module, images: Tensor, choices: tuple[int, ...] = (2, 4, 8)) -> Sensitivity:
    """Return the divergence that each layer's weights alone cause in each number of bits."""
    training = {module: module.training for module in model.modules()}
    try:
        return sensitivity(model, divergence(model, images), [zeroq_scheme(bits) for bits in choices])
    finally:
        for module, mode in training.items():
            module.training = mode
