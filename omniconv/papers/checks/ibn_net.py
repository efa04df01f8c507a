"""Instance normalisation of half the shallow channels is free, forgets contrast and brightness, and lets a network
trained on ordinary pictures read those of another contrast and brightness without losing on ordinary ones.

The training sees Fashion-MNIST averaged to 14 x 14 pixels. The test pictures are shown as they are and with their gain
multiplied by 0.4 and by 2.5 and their brightness raised and lowered by one standard deviation.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.seeds import derive
from omniconv.layers.norm.ibn import IBN
from omniconv.models.factory import create_model
from omniconv.papers.check import Check
from omniconv.papers.small import accuracy, fashion_mnist, train

PARAMETERS = 25_557_032
INVARIANCE = 1e-3
DEPENDENCE = 0.1
GAIN = 3.0
CLEAN = -1.0
SEEDS = (0, 1, 2)
SHIFTS = {"gain 0.4": (0.4, 0.0), "gain 2.5": (2.5, 0.0), "brighter": (1.0, 1.0), "darker": (1.0, -1.0)}
IMAGES, EPOCHS, TEST = 8000, 2, 2000


def changes(channels: int = 16) -> tuple[float, float]:
    """Return how much the instance half and the batch half change under x -> a x + b, per image and channel."""
    torch.manual_seed(0)
    layer, x = IBN(channels), torch.randn(4, channels, 12, 10)
    a, b = torch.rand(4, channels, 1, 1) * 4 + 0.25, torch.randn(4, channels, 1, 1)
    with torch.no_grad():
        difference = (layer(a * x + b) - layer(x)).abs()
    return float(difference[:, : layer.instances].max()), float(
        difference[:, layer.instances :].amax((0, 2, 3)).min()
    )


def count(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(p.numel() for p in model.parameters())


def make_network(seed: int, ibn: str | None) -> nn.Module:
    """Return a small residual network in its plain, IBN-a or IBN-b form."""
    torch.manual_seed(derive(seed, "weights"))
    model = create_model(
        "resnet18", num_classes=10, in_chans=1, depths=(1, 1, 1), widths=(16, 32, 64), stem="3x3", ibn=ibn
    )
    return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def shifted_accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the mean accuracy over the shifts."""
    scores = [accuracy(model, (gain * images + offset, labels)) for gain, offset in SHIFTS.values()]
    return sum(scores) / len(scores)


def run(check: Check) -> None:
    """Measure counts, what each half forgets, and a small training."""
    plain, ibn = (count(create_model(name, device="meta")) for name in ("resnet50", "resnet50_ibn_a"))
    check.require("parameters of ResNet-50-IBN-a", ibn, "==", PARAMETERS)
    check.require("parameters that IBN-a adds to ResNet-50", ibn - plain, "==", 0)
    instance, batch = changes()
    check.require("change of the instance half under a x + b", instance, "<=", INVARIANCE)
    check.require("least change of a channel of the batch half under a x + b", batch, ">=", DEPENDENCE)

    training, (images, labels) = ((F.avg_pool2d(x, 2), y) for x, y in fashion_mnist(IMAGES, TEST))
    clean: dict[str | None, list[float]] = {None: [], "a": [], "b": []}
    shifted: dict[str | None, list[float]] = {None: [], "a": [], "b": []}
    for seed in SEEDS:
        for form in clean:
            model = make_network(seed, form)
            train(model, training, epochs=EPOCHS, seed=seed, shift=1)
            clean[form].append(accuracy(model, (images, labels)))
            shifted[form].append(shifted_accuracy(model, images, labels))
    mean = {
        "clean": {form: sum(values) / len(values) for form, values in clean.items()},
        "shifted": {form: sum(values) / len(values) for form, values in shifted.items()},
    }
    check.require(
        "accuracy of IBN-a minus plain on shifted pictures, mean of 3 seeds",
        mean["shifted"]["a"] - mean["shifted"][None], ">=", GAIN,
        baseline=mean["shifted"][None], unit="points",
    )  # fmt: skip
    check.require(
        "accuracy of IBN-a minus plain on ordinary pictures, mean of 3 seeds",
        mean["clean"]["a"] - mean["clean"][None], ">=", CLEAN, baseline=mean["clean"][None], unit="points",
    )  # fmt: skip
    for name, scores in mean.items():
        rounded = {form or "plain": round(score, 2) for form, score in scores.items()}
        check.note(f"{name} accuracies, means of 3 seeds: {rounded}")
