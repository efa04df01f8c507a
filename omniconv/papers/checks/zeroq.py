"""Images distilled from batch-norm statistics calibrate a network nearly as real ones do: their ranges are those of
real images, 8 bits cost nothing, layers are ranked alike, and since divergences of layers add up, dynamic programming
finds the whole Pareto frontier.

The network, five convolutions with batch norm and a classifier, is trained for 3 epochs on 10,000 images of
Fashion-MNIST averaged to 14 x 14 pixels, as in the check of AdaQuant. 32 images are distilled in 300 iterations; the
baseline is Gaussian noise, from which they start. Ranges are those of layers' inputs without the 0.1% at either end,
compared with those of 1,000 training images. Weights are asymmetric, by channel.
"""

import itertools
import statistics

import numpy as np
import torch
from torch import Tensor, nn

from omniconv.compress.quantize.allocate import frontier
from omniconv.compress.quantize.correct import layer_io
from omniconv.compress.quantize.quantize import fake_quantize, quantize
from omniconv.compress.quantize.quantizer import Quantizer
from omniconv.compress.quantize.sensitivity import divergence
from omniconv.compress.quantize.zeroq import (
    distilled_images,
    statistics_loss,
    zeroq_scheme,
    zeroq_sensitivity,
)
from omniconv.compress.report import weight_layers
from omniconv.core.seeds import generator
from omniconv.papers.check import Check
from omniconv.papers.checks.adaquant import WIDTHS
from omniconv.papers.checks.quant_survey import activations, small_pictures, trained
from omniconv.papers.small import accuracy

DROPPED = 0.95
RANGE_ERROR = 0.15
W8A8_DROP = 0.5
W4A8_GAIN = 2.0
CORRELATION = 0.9
RANK = 0.8
SHAPE = (1, 14, 14)
COUNT, ITERATIONS = 32, 300
CONFIGURATIONS = 20
SEEDS = (0, 1, 2)
SPAN = "percentile"


def widths_of_inputs(model: nn.Module, images: Tensor) -> np.ndarray:
    """Return the width of the range of every layer's input."""
    widths = []
    for name in weight_layers(model):
        low, high = Quantizer(activations(8, SPAN)).find_range(layer_io(model, name, images)[0])
        widths.append(float(high.clamp(min=0) - low.clamp(max=0)))
    return np.array(widths)


def _exact(check: Check, model: nn.Module, made: Tensor, real: Tensor) -> None:
    """Sensitivities, their ranking, how they add up, and the frontier."""
    from scipy.stats import rankdata

    table = zeroq_sensitivity(model, made)
    costs, sizes = np.array(table.costs), np.array(table.sizes)
    layers = np.arange(len(costs))
    points = [
        (costs[layers, choice].sum(), sizes[layers, choice].sum())
        for choice in itertools.product(range(3), repeat=6)
    ]
    best: list[tuple[float, float]] = []
    for cost, size in sorted(points, key=lambda point: (point[1], point[0])):
        if not best or cost < best[-1][0] - 1e-15:
            best.append((cost, size))
    found = [(point.cost, point.size) for point in frontier(table.costs, table.sizes)]
    same = len(best) == len(found) and np.allclose(best, found, rtol=1e-9, atol=1e-12)
    check.require("frontiers by dynamic programming that equal that of all 3^6 assignments", same, "==", 1)
    measure = divergence(model, made)
    random = np.random.default_rng(0)
    predicted, measured = [], []
    for _ in range(CONFIGURATIONS):
        choice = random.integers(0, 3, 6).tolist()
        predicted.append(costs[layers, choice].sum())
        measured.append(measure(fake_quantize(model, weights=table.chosen(choice), activations=None)))
    check.require(
        f"correlation of summed and joint divergence over {CONFIGURATIONS} assignments",
        float(np.corrcoef(predicted, measured)[0, 1]), ">", CORRELATION,
    )  # fmt: skip
    truth = np.array(zeroq_sensitivity(model, real).costs)
    ranks = [float(np.corrcoef(rankdata(costs[:, k]), rankdata(truth[:, k]))[0, 1]) for k in (0, 1)]
    check.require(
        "rank correlation of layers' divergences with those on real images, mean of 2 and 4 bits",
        statistics.mean(ranks), ">=", RANK,
    )  # fmt: skip


def run(check: Check) -> None:
    """Measure the claim."""
    data, test = small_pictures(10_000, 4_000)
    drops, gains = [], []
    for seed in SEEDS:
        model = trained(seed, data, widths=WIDTHS)
        noise = torch.randn(COUNT, *SHAPE, generator=generator(seed, "zeroq"))
        made = distilled_images(model, SHAPE, count=COUNT, steps=ITERATIONS, seed=seed)
        if seed == 0:
            with torch.no_grad():
                before, after = (float(statistics_loss(model, images)) for images in (noise, made))
            check.require(
                "share of the statistics loss gone after 300 iterations", 1 - after / before, ">=", DROPPED
            )
            real = widths_of_inputs(model, data[0][:1000])
            errors, noisy = (abs(widths_of_inputs(model, images) / real - 1) for images in (made, noise))
            check.require(
                "error of the range of a layer's input, worst layer", errors.max(), "<=", RANGE_ERROR,
                baseline=noisy.max(),
            )  # fmt: skip
            check.note(f"Errors of ranges: {errors.round(3).tolist()}, with noise {noisy.round(3).tolist()}.")
            _exact(check, model, made, data[0][:256])
        scores = {
            (bits, source): accuracy(
                quantize(model, images, weights=zeroq_scheme(bits), activations=activations(8, SPAN))[0], test
            )
            for bits in (8, 4)
            for source, images in (("distilled", made), ("noise", noise), ("real", data[0][:COUNT]))
        }
        full = accuracy(model, test)
        drops.append(full - scores[8, "distilled"])
        gains.append(scores[4, "distilled"] - scores[4, "noise"])
        check.note(f"Seed {seed}: float {full:.2f}%, (bits of weights, calibration): {scores}.")
    check.require(
        "points lost in W8A8, mean of 3 seeds", statistics.mean(drops), "<=", W8A8_DROP, unit="points"
    )
    check.require(
        "points gained in W4A8 over calibration with noise, mean of 3 seeds", statistics.mean(gains), ">=", W4A8_GAIN,
        unit="points",
    )  # fmt: skip
