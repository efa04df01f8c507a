"""Global magnitude pruning, one threshold for all layers, prunes to an exact count and after the same
fine-tuning is at least as accurate as uniform magnitude pruning and SNIP; a minimum of weights a layer
prevents collapse at extreme sparsity, and pruning gradually saves more multiply-adds at equal weights.

Pictures are Fashion-MNIST, averaged to 14 x 14 pixels, 10,000 for training and 5,000 of the test set. The
comparison trains a plain convolutional network of 60,688 weights for 2 epochs, prunes and fine-tunes for 1;
SNIP and gradual pruning, which start from new weights, train for 3. The collapse is shown on a MobileNet-like
network without shortcuts of 783,104 weights, trained for 2 epochs, pruned and fine-tuned for 1. Everybody has
the same recipe.

The collapse was first shown on the same network of half the width, with a minimum of 40. There the 1,005
weights that 99.5% leaves to 14 layers joined input and output in none of three seeds, whatever the minimum, so
the part about recovery failed (9.6%, more than 30% wanted). The width was doubled for this reason and before
anything was measured with it; thresholds stayed.
"""

import statistics
from collections import defaultdict

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from omniconv.compress.prune.global_magnitude import global_magnitude, gradual_sparsity, magnitude_masks
from omniconv.compress.prune.masks import MaskKeeper, hold_masks, prunable_weights
from omniconv.compress.prune.ratios import erk_magnitude, lamp, snip, uniform_magnitude
from omniconv.compress.report import CompressionReport, compare
from omniconv.papers.check import Check
from omniconv.papers.small import Split, accuracy, fashion_mnist, train

EXACT = (0.90, 0.98, 0.999)
SPARSITIES = (0.90, 0.95, 0.98)
COLLAPSE = 0.995
SEEDS = (0, 1, 2)
CHANCE = 10.0
# As the record says: at least as accurate, more than three times chance, more multiply-adds saved.
MARGIN = 0.0
RECOVERED = 3 * CHANCE
# 14 layers of at least 100 weights need 1,400 of the 3,916 that are left at 99.5%.
MIN_WEIGHTS = 100

INPUT = (1, 14, 14)
PRETRAIN = 2.0
FINETUNE = 1.0
RECIPE = {"batch": 64, "lr": 5e-3, "shift": 1}


def _block(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]


def _head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)]


def plain_network() -> nn.Sequential:
    """Return four convolutions and a classifier."""
    convolutions = [*_block(1, 16, 3), *_block(16, 32, 3, 2), *_block(32, 64, 3, 2), *_block(64, 64, 3)]
    return nn.Sequential(*convolutions, *_head(64))


def mobile_network() -> nn.Sequential:
    """Return six depthwise-separable blocks without shortcuts, as in MobileNet-V1."""
    layers = _block(1, 64, 3, 2)
    for inputs, outputs, stride in (
        *((64, 128, 1), (128, 256, 2), (256, 256, 1)),
        *((256, 512, 2), (512, 512, 1), (512, 512, 1)),
    ):
        layers += [*_block(inputs, inputs, 3, stride, inputs), *_block(inputs, outputs, 1)]
    # Twice as fast here; torch's type stubs lack the argument.
    return nn.Sequential(*layers, *_head(512)).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def _exact_counts(check: Check, model: nn.Module) -> None:
    """The count, and torch's own global pruning as the oracle."""
    total = sum(weight.numel() for weight in prunable_weights(model).values())
    wrong = differ = 0
    for sparsity in EXACT:
        ours, _ = global_magnitude(model, sparsity)
        weights = prunable_weights(ours)
        wrong += abs(sum(int((w == 0).sum()) for w in weights.values()) - round(sparsity * total))
        theirs, _ = global_magnitude(model, 0.0)
        layers = [(theirs.get_submodule(name), "weight") for name in weights]
        prune.global_unstructured(layers, prune.L1Unstructured, amount=sparsity)
        for layer in layers:
            prune.remove(*layer)
        oracle = prunable_weights(theirs)
        differ += sum(int((oracle[name] != weight).sum()) for name, weight in weights.items())
    check.require("weights pruned beside the exact count at 90, 98 and 99.9%", wrong, "==", 0)
    check.require("weights unlike torch.nn.utils.prune.global_unstructured's", differ, "==", 0)


def _finetune(model: nn.Module, data: Split, seed: int, epochs: float = FINETUNE) -> None:
    with hold_masks(model) as keeper:
        train(model, data, epochs=epochs, seed=seed, after_step=lambda *_: keeper.apply(), **RECIPE)


def _gradually(model: nn.Module, data: Split, seed: int, sparsity: float) -> CompressionReport:
    """Train from new weights while the sparsity rises over the first two thirds, every tenth step."""
    dense, _ = global_magnitude(model, 0.0)
    keeper = MaskKeeper(model, magnitude_masks(model, 0.0))
    share = PRETRAIN / (PRETRAIN + FINETUNE)

    def prune_more(step: int, steps: int) -> None:
        end = int(share * steps)
        if step == end or (step < end and step % 10 == 0):
            keeper.update(magnitude_masks(model, gradual_sparsity(step, end, 0.0, sparsity)))
        keeper.apply()

    train(model, data, epochs=PRETRAIN + FINETUNE, seed=seed, after_step=prune_more, **RECIPE)
    keeper.release()
    return compare("gradual", dense, model, input_shape=INPUT)


def _saved(report: CompressionReport) -> float:
    """Return the share of multiply-adds that zeros save, in percent."""
    assert report.after.macs is not None
    assert report.after.sparse_macs is not None
    return 100 * (1 - report.after.sparse_macs / report.after.macs)


def _compare_methods(check: Check, data: Split, test: Split) -> None:
    right: dict[tuple[str, float], list[float]] = defaultdict(list)
    saved: dict[tuple[str, float], list[float]] = defaultdict(list)
    unequal = 0
    images, labels = data[0][:256], data[1][:256]

    def first_loss(model: nn.Module) -> Tensor:
        return F.cross_entropy(model(images), labels)

    for seed in SEEDS:
        torch.manual_seed(seed)
        new = plain_network()
        dense, _ = global_magnitude(new, 0.0)
        train(dense, data, epochs=PRETRAIN, seed=seed, **RECIPE)
        right["dense", 0.0].append(accuracy(dense, test))
        for sparsity in SPARSITIES:
            runs = {
                "global": (*global_magnitude(dense, sparsity, input_shape=INPUT), FINETUNE),
                "uniform": (*uniform_magnitude(dense, sparsity, input_shape=INPUT), FINETUNE),
                "ERK": (*erk_magnitude(dense, sparsity, input_shape=INPUT), FINETUNE),
                "LAMP": (*lamp(dense, sparsity, input_shape=INPUT), FINETUNE),
                "SNIP": (*snip(new, sparsity, first_loss, input_shape=INPUT), PRETRAIN + FINETUNE),
            }
            kept = sum(layer.nonzero for layer in runs["global"][1].layers)
            for name, (model, report, epochs) in runs.items():
                _finetune(model, data, 100 + seed, epochs)
                right[name, sparsity].append(accuracy(model, test))
                saved[name, sparsity].append(_saved(report))
                unequal += abs(sum(layer.nonzero for layer in report.layers) - kept)
            model, _ = global_magnitude(new, 0.0)
            report = _gradually(model, data, 100 + seed, sparsity)
            right["gradual", sparsity].append(accuracy(model, test))
            saved["gradual", sparsity].append(_saved(report))
            unequal += abs(sum(layer.nonzero for layer in report.layers) - kept)
    mean = {key: statistics.mean(values) for key, values in right.items()}
    check.require("weights by which the compared networks differ in count", unequal, "==", 0)
    for sparsity in SPARSITIES:
        for other in ("uniform", "SNIP"):
            check.require(
                f"accuracy of global over {other} pruning at {sparsity:.0%}, mean of {len(SEEDS)} seeds",
                mean["global", sparsity] - mean[other, sparsity],
                ">=",
                MARGIN,
                baseline=mean[other, sparsity],
                unit="% (baseline: its accuracy; measured: points above it)",
            )
    for sparsity in SPARSITIES:
        gradual, once = (statistics.mean(saved[name, sparsity]) for name in ("gradual", "global"))
        check.require(
            f"multiply-adds saved by gradual over one-shot pruning at {sparsity:.0%}",
            gradual - once,
            ">",
            0.0,
            baseline=once,
            unit="% (baseline: saved by one-shot; measured: points above it)",
        )
    check.note(f"Dense accuracy {mean['dense', 0.0]:.2f}%.")
    for sparsity in SPARSITIES:
        figures = (
            f"{name} {value:.2f}% (saves {statistics.mean(saved[name, s]):.1f}% of the multiply-adds)"
            for (name, s), value in mean.items()
            if s == sparsity and name != "dense"
        )
        check.note(f"Accuracy at {sparsity:.0%} sparsity: {', '.join(figures)}.")


def _collapse(check: Check, data: Split, test: Split) -> None:
    least: dict[str, list[int]] = {"free": [], "floor": []}
    right: dict[str, list[float]] = {"free": [], "floor": []}
    unequal = 0
    for seed in SEEDS:
        torch.manual_seed(seed)
        dense = mobile_network()
        train(dense, data, epochs=PRETRAIN, seed=seed, **RECIPE)
        counts = []
        for name, floor in (("free", 0), ("floor", MIN_WEIGHTS)):
            model, report = global_magnitude(dense, COLLAPSE, min_weights=floor)
            least[name].append(min(layer.nonzero for layer in report.layers))
            counts.append(sum(layer.nonzero for layer in report.layers))
            _finetune(model, data, 100 + seed)
            right[name].append(accuracy(model, test))
        unequal += abs(counts[0] - counts[1])
    check.require("fewest weights in a layer at 99.5% without a minimum", max(least["free"]), "==", 0)
    check.require(
        "highest accuracy without a minimum after 1 epoch",
        max(right["free"]),
        "<=",
        # Chance, and what one constant answer can get above it on these 5,000 pictures.
        CHANCE + 1,
        unit="%",
    )
    check.require(
        f"fewest weights in a layer with a minimum of {MIN_WEIGHTS}", min(least["floor"]), ">=", MIN_WEIGHTS
    )
    check.require("weights by which the minimum changes the count", unequal, "==", 0)
    check.require(
        f"lowest accuracy with a minimum of {MIN_WEIGHTS} after 1 epoch",
        min(right["floor"]),
        ">",
        RECOVERED,
        baseline=max(right["free"]),
        unit="%",
    )


def run(check: Check) -> None:
    """Measure the claim."""
    (images, labels), (test_images, test_labels) = fashion_mnist(train=10_000, test=5_000)
    data, test = (F.avg_pool2d(images, 2), labels), (F.avg_pool2d(test_images, 2), test_labels)
    torch.manual_seed(0)
    _exact_counts(check, plain_network())
    _compare_methods(check, data, test)
    _collapse(check, data, test)
