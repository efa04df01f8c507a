"""Factorised convolutions save what the paper says in a network of its size, and smoothed labels give a small network
on noisy labels honest probabilities at no cost in accuracy.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.seeds import derive, generator
from omniconv.design.cost import count_cost
from omniconv.design.factorize import factorization_saving
from omniconv.losses.label_smoothing import LabelSmoothing
from omniconv.models.factory import create_model
from omniconv.papers.check import Check
from omniconv.papers.small import Split, accuracy, cifar10, train
from omniconv.tasks.classification import reliability

PARAMETERS, WITH_AUX, PARAMETERS_SHARE = 23.83e6, 27.16e6, 0.001
MACS, MACS_SHARE = 5.7e9, 0.02
SIDES = (35, 17, 8)
SAVINGS = {((5, 5), ((3, 3), (3, 3))): 0.28, ((3, 3), ((3, 1), (1, 3))): 1 / 3}
ERROR = 1e-7
SMOOTHING = 0.1
CALIBRATION_GAIN = 0.25
ACCURACY_LOSS = 1.0
WIDTH = 1 / 8
NOISE, IMAGES, EPOCHS, BATCH, BINS = 0.2, 400, 20, 20, 15
SEEDS = (0, 1, 2)


def counted_saving(kernel: tuple[int, int], parts: tuple[tuple[int, int], ...]) -> float:
    """Return the share of multiply-adds that real layers save."""
    layers = [nn.Conv2d(64, 64, part, padding="same", bias=False) for part in (kernel, *parts)]
    whole, *pieces = [count_cost(layer, (64, 35, 35)).macs for layer in layers]
    return 1 - sum(pieces) / whole


def smoothing_errors() -> tuple[float, float]:
    """Return the loss's distance from cross-entropy with a mixed target, and its gradient's from p - q."""
    logits = torch.randn(32, 10, dtype=torch.float64, generator=generator(0, "logits"), requires_grad=True)
    targets = torch.arange(32) % 10
    q = (1 - SMOOTHING) * F.one_hot(targets, 10).double() + SMOOTHING / 10
    loss = LabelSmoothing(SMOOTHING, "sum")(logits, targets)
    (gradient,) = torch.autograd.grad(loss, [logits])
    mixed = -(q * logits.log_softmax(1)).sum()
    loss_error, gradient_error = (loss - mixed).abs(), (gradient - (logits.softmax(1) - q)).abs().max()
    return loss_error.item(), gradient_error.item()


@torch.no_grad()
def calibration_error(model: nn.Module, split: Split) -> float:
    """Return the expected calibration error in percent: how far confidence is from accuracy, over bins."""
    confidence, predicted = torch.cat([model.eval()(x) for x in split[0].split(500)]).softmax(1).max(1)
    return 100 * reliability(confidence.numpy(), (predicted == split[1]).numpy(), BINS)["ece"]


def with_noise(labels: Tensor, seed: int) -> Tensor:
    """Return labels of which a share is replaced by another class."""
    random = generator(seed, "noise")
    replaced = torch.rand(len(labels), generator=random) < NOISE
    other = (labels + torch.randint(1, 10, labels.shape, generator=random)) % 10
    return torch.where(replaced, other, labels)


def train_small(seed: int, loss: nn.Module, images: Split) -> nn.Module:
    """Return a small Inception-v3 that has seen the images often enough to learn them by heart."""
    torch.manual_seed(derive(seed, "weights"))
    model = create_model("inception_v3_test", num_classes=10, width=WIDTH)
    train(model, images, epochs=EPOCHS, batch=BATCH, seed=seed, shift=0, flip=False, loss=loss)
    return model


def run(check: Check) -> None:
    """Measure counts, savings, the loss, and two trainings a seed."""
    for what, aux, published in (("", False, PARAMETERS), (" with auxiliary head", True, WITH_AUX)):
        model = create_model("inception_v3", aux=aux, device="meta")
        count = sum(p.numel() for p in model.parameters())
        share = abs(count / published - 1)
        check.require(f"parameters{what}: distance from the published count", share, "<=", PARAMETERS_SHARE)
    model = create_model("inception_v3", device="meta")
    share = abs(count_cost(model, (3, 299, 299)).macs / MACS - 1)
    check.require("multiply-adds at 299 pixels: distance from the published count", share, "<=", MACS_SHARE)
    maps = model.forward_stages(torch.empty(1, 3, 299, 299, device="meta"))
    for side, fmap in zip(SIDES, maps[-3:], strict=True):
        check.require(f"side of the map of {fmap.shape[1]} channels", fmap.shape[-1], "==", side)
    for (kernel, parts), saving in SAVINGS.items():
        stack = " and ".join(f"{h}x{w}" for h, w in parts)
        error = abs(counted_saving(kernel, parts) - saving)
        error = max(error, abs(factorization_saving(kernel, list(parts)) - saving))
        check.require(f"{stack} for {kernel[0]}x{kernel[1]}: error of the saving", error, "<=", ERROR)

    loss_error, gradient_error = smoothing_errors()
    check.require("label smoothing minus cross-entropy with the mixed target", loss_error, "<=", ERROR)
    check.require("its gradient minus p - q", gradient_error, "<=", ERROR)

    (x, y), (tx, ty) = cifar10(IMAGES, 2000)
    x, test = F.avg_pool2d(x, 2), (F.avg_pool2d(tx, 2), ty)
    errors: dict[float, list[float]] = {0.0: [], SMOOTHING: []}
    scores: dict[float, list[float]] = {0.0: [], SMOOTHING: []}
    for seed in SEEDS:
        images = x, with_noise(y, seed)
        for smoothing in errors:
            trained = train_small(seed, LabelSmoothing(smoothing), images)
            errors[smoothing].append(calibration_error(trained, test))
            scores[smoothing].append(accuracy(trained, test))
    plain, smooth = (sum(errors[key]) / len(SEEDS) for key in (0.0, SMOOTHING))
    check.require(
        "share of the calibration error that smoothing removes, mean of 3 seeds",
        1 - smooth / plain, ">=", CALIBRATION_GAIN,
    )  # fmt: skip
    before, after = (sum(scores[key]) / len(SEEDS) for key in (0.0, SMOOTHING))
    check.require(
        "accuracy with smoothed labels minus without, CIFAR-10 at 16 pixels, 20% wrong labels",
        after - before, ">=", -ACCURACY_LOSS, baseline=before, unit="points",
    )  # fmt: skip
    check.note(f"calibration errors without {errors[0.0]}, with {errors[SMOOTHING]}")
    check.note(f"accuracies without {scores[0.0]}, with {scores[SMOOTHING]}")
