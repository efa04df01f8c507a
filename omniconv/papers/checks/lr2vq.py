"""Codes of low-rank representations take the bits that the formula says, and after equal training they are at least as
accurate as codes of whole subvectors; the best dimension lies between too low a rank and too many dimensions to
cluster, and is known before anything is clustered.

Pictures are Fashion-MNIST, averaged to 14 x 14 pixels. A network is trained for 3 epochs; from there both methods train
for one epoch before clustering, one with soft and one with fixed codes. With the best clusters of all the total error
could not rise with the dimension, as each codebook of lower rank is also one of full rank; what k-means finds may be
worse.
"""

import itertools
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from omniconv.compress.quantize.kmeans import kmeans
from omniconv.compress.quantize.lr2vq import (
    LowRankLayer,
    VectorQuantizedLayer,
    estimate_rank,
    low_rank_factors,
    lr2vq,
    subvectors,
)
from omniconv.core.seeds import derive
from omniconv.core.weights import save_weights
from omniconv.papers.check import Check
from omniconv.papers.small import accuracy, fashion_mnist, train

INTERIOR = 0.5
CLOSE = 1
MARGIN = 0.0
SEEDS = (0, 1, 2)

SIZE, CENTROIDS, RANK = 8, 16, 4
PRETRAIN = 3.0
RECIPE: dict[str, Any] = {"batch": 128, "shift": 1}


def file_bits_off() -> int:
    """Return by how many bits the tensors in files of several layers differ from the formula."""
    off = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "w.safetensors"
        for channels, size, k, rank in ((32, 8, 16, 4), (64, 4, 256, 3), (48, 16, 32, 16)):
            torch.manual_seed(0)
            low = LowRankLayer(nn.Conv2d(16, channels, 3, bias=False), size, rank)
            low.cluster(k)
            save_weights(path, VectorQuantizedLayer(low).state_dict())
            content = path.read_bytes()
            stored = 8 * (len(content) - 8 - int.from_bytes(content[:8], "little"))
            count, lift = channels * 16 * 9 // size, 0 if rank == size else rank * size
            off += abs(stored - (count * (k - 1).bit_length() + 32 * (k * rank + lift)))
    return off


def plain_difference() -> int:
    """Return in how many weights full rank differs from k-means on the subvectors themselves."""
    torch.manual_seed(0)
    layer = nn.Conv2d(16, 32, 3)
    low = LowRankLayer(layer, SIZE, SIZE)
    low.cluster(CENTROIDS)
    codebook, codes = kmeans(subvectors(layer.weight.detach(), SIZE), CENTROIDS)
    return int((subvectors(VectorQuantizedLayer(low).weight().detach(), SIZE) != codebook[codes]).sum())


def network() -> nn.Sequential:
    """Return four convolutions and a classifier, of which the three inner convolutions are compressed."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 16, 1), (16, 32, 2), (32, 64, 2), (64, 64, 1)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def errors(weight: torch.Tensor) -> tuple[list[float], list[float]]:
    """Return the squared errors of low rank and of clustering, for every dimension, over the square of the weight."""
    rows = subvectors(weight.detach(), SIZE)
    lost, clustered = [], []
    for rank in range(1, SIZE + 1):
        representations, lift = low_rank_factors(rows, rank)
        codebook, codes = kmeans(representations, CENTROIDS, iterations=200)
        lost.append(float((rows - representations @ lift).square().sum() / rows.square().sum()))
        clustered.append(float((representations - codebook[codes]).square().sum() / rows.square().sum()))
    return lost, clustered


def run(check: Check) -> None:
    """Measure bits, equality with plain quantization, errors against the dimension, and accuracies."""
    check.require("bits by which files differ from the formula", file_bits_off(), "==", 0)
    check.require("weights unlike plain vector quantization at full rank", plain_difference(), "==", 0)

    training, test = ((F.avg_pool2d(x, 2), y) for x, y in fashion_mnist(10000, 10000))
    scores: dict[str, list[float]] = {"dense": [], "LR2VQ": [], "plain": []}
    wrong_way, interior, close, layers = 0, 0, 0, 0
    sizes: dict[str, int] = {}
    for seed in SEEDS:
        torch.manual_seed(derive(seed, "weights"))
        dense = network()
        train(dense, training, epochs=PRETRAIN, seed=seed, **RECIPE)
        scores["dense"].append(accuracy(dense, test))
        for name in ("3", "6", "9"):
            weight = dense.get_submodule(name).get_parameter("weight")
            lost, clustered = errors(weight)
            total = [a + b for a, b in zip(lost, clustered, strict=True)]
            best = 1 + total.index(min(total))
            estimate = estimate_rank(weight, SIZE, CENTROIDS)
            wrong_way += sum(b > a for a, b in itertools.pairwise(lost))
            wrong_way += sum(b < a for a, b in itertools.pairwise(clustered))
            interior += 1 < best < SIZE
            close += abs(estimate - best) <= CLOSE
            layers += 1
            check.note(
                f"seed {seed}, layer {name}: best {best}, estimate {estimate}, errors {[f'{e:.3f}' for e in total]}"
            )
        for name, rank in (("LR2VQ", RANK), ("plain", SIZE)):

            def tune(model: nn.Module, seed: int = seed) -> None:
                train(model, training, epochs=1, seed=100 + seed, **RECIPE)

            model, report = lr2vq(dense, SIZE, CENTROIDS, rank, train=tune)
            scores[name].append(accuracy(model, test))
            sizes[name] = sum(m.stored_bits for m in model.modules() if isinstance(m, VectorQuantizedLayer))
            check.note(f"seed {seed}, {name}: {' '.join(report.notes)}")
    check.require("steps of the dimension that move an error the wrong way", wrong_way, "==", 0)
    check.require("share of layers whose total error is least inside", interior / layers, ">=", INTERIOR)
    check.require("layers whose estimate is more than one from the best", layers - close, "==", 0)
    check.require("bits of LR2VQ over those of plain quantization", sizes["LR2VQ"] / sizes["plain"], "<=", 1)
    means = {name: statistics.fmean(values) for name, values in scores.items()}
    check.require(
        "accuracy of LR2VQ minus plain vector quantization, mean of 3 seeds", means["LR2VQ"] - means["plain"], ">=",
        MARGIN, baseline=means["plain"], unit="points",
    )  # fmt: skip
    check.note(f"accuracies {scores}")
