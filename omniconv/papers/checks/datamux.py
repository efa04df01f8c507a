"""N inputs pass a network as one mixture and their answers are told apart behind it: what inputs hear of each other is
what the maps say, the network runs once for N inputs, and digits are still recognised at N = 2 and above chance at 8.

Digits are enlarged to 16 x 16 pixels. The perceptron mixes them by random orthogonal matrices and has one demultiplexer
that is told the place; the convolutional network mixes by learned convolutions and has a demultiplexer for each place.
All networks have the same recipe.
"""

import statistics
import time

import torch
from torch import nn

from omniconv.compress.merge.datamux import (
    ConvMultiplexer,
    DataMux,
    IndexDemultiplexer,
    MLPDemultiplexer,
    Multiplexer,
)
from omniconv.core.seeds import derive
from omniconv.papers.check import Check
from omniconv.papers.small import accuracy, digits, train

EXACT = 1e-5
CROSS_TALK = 0.05
TWO = 90.0
EIGHT = 30.0
TIME = 0.5
SEEDS = (0, 1, 2)
COUNTS = (2, 4, 8)
EPOCHS = 40.0


def cross_talk(count: int = 4, channels: int = 64, groups: int = 256) -> tuple[float, float]:
    """Return how far separated inputs are from the closed form, exactly and in the mean.

    Behind a linear network whose inverse is known, an input comes back with the others under
    products of two orthogonal matrices, so the square of what it hears is in the mean the sum of theirs.
    """
    torch.manual_seed(0)
    mux = Multiplexer(count, channels, "orthogonal", dtype=torch.float64)
    base = nn.utils.parametrizations.orthogonal(
        nn.Linear(channels, channels, bias=False, dtype=torch.float64)
    )
    x = torch.randn(groups, count, channels, dtype=torch.float64)
    with torch.no_grad():
        heard = mux.separate(base(mux(x)) @ base.weight) - x
    products = torch.einsum("iba,jbc->ijac", mux.maps, mux.maps)
    products[range(count), range(count)] = 0
    wanted = torch.einsum("ijac,bjc->bia", products, x)
    squares = x.square().sum((1, 2))[:, None] - x.square().sum(2)
    exact = float((heard - wanted).abs().max())
    return exact, abs(float(heard.square().sum() / squares.sum()) - 1)


def mask_cross_talk(count: int = 4, channels: int = 64) -> float:
    """Return the largest difference of inputs from what comes back in their own channels under masks."""
    torch.manual_seed(0)
    mux = Multiplexer(count, channels, "mask")
    x = torch.randn(32, count, channels)
    return float(((mux.separate(mux(x)) - x) * mux.maps).abs().max())


def permutation_error(count: int = 4) -> float:
    """Return the largest difference of outputs when inputs are permuted together with their places."""
    torch.manual_seed(0)
    model = perceptron(count)
    x = torch.randn(8 * count, 1, 16, 16)
    order = torch.randperm(count)
    with torch.no_grad():
        wanted = model(x).unflatten(0, (-1, count))[:, order]
        mux, demux = model[1].mux, model[1].demux
        assert isinstance(mux, Multiplexer)
        assert isinstance(demux, IndexDemultiplexer)
        mux.maps.copy_(mux.maps[order])
        demux.places.copy_(demux.places[order])
        got = model(x.unflatten(0, (-1, count))[:, order].flatten(0, 1)).unflatten(0, (-1, count))
    return float((got - wanted).abs().max())


def perceptron(count: int) -> nn.Sequential:
    """Return a multiplexed perceptron of two hidden layers."""
    base = nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU())
    return nn.Sequential(
        nn.Flatten(),
        DataMux(base, Multiplexer(count, 256, "orthogonal"), IndexDemultiplexer(count, 256, 10, 128)),
    )


def convolutional(count: int) -> DataMux:
    """Return a multiplexed network of three convolutions."""
    base = nn.Sequential(
        nn.Conv2d(8, 32, 3, padding=1), nn.GELU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1), nn.GELU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(1024, 128), nn.GELU(),
    )  # fmt: skip
    return DataMux(base, ConvMultiplexer(count, 1, 8), MLPDemultiplexer(count, 128, 10))


def rows(count: int, images: int = 64) -> int:
    """Return for how many inputs the base network runs."""
    model, seen = convolutional(count), []
    model.base.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    model(torch.randn(images, 1, 16, 16))
    return sum(seen)


def time_ratio(rounds: int = 15) -> float:
    """Return the time for a batch at N = 4 over that at N = 1, medians of interleaved rounds."""
    models = {count: convolutional(count).eval() for count in (1, 4)}
    x = torch.randn(256, 1, 16, 16)
    times: dict[int, list[float]] = {count: [] for count in models}
    with torch.no_grad():
        for _ in range(rounds + 2):
            for count, model in models.items():
                began = time.perf_counter()
                model(x)
                times[count].append(time.perf_counter() - began)
    return statistics.median(times[4][2:]) / statistics.median(times[1][2:])


def run(check: Check) -> None:
    """Measure cross-talk, order, runs of the base network, trained networks, and time."""
    exact, mean = cross_talk()
    check.require("difference of what inputs hear from the products of their maps", exact, "<=", EXACT)
    check.require("relative difference of its mean square from the others' squares", mean, "<=", CROSS_TALK)
    check.require("what inputs hear of others under masks", mask_cross_talk(), "==", 0)
    check.require("difference when inputs are permuted with their places", permutation_error(), "<=", EXACT)
    for count in (1, *COUNTS):
        check.require(
            f"inputs that the base network sees for 64 images at N = {count}", rows(count), "==", 64 // count
        )

    training, test = digits(16)
    for name, make in (("perceptron", perceptron), ("convolutional network", convolutional)):
        means = {}
        for count in COUNTS:
            scores = []
            for seed in SEEDS:
                torch.manual_seed(derive(seed, "weights"))
                model = make(count)
                train(model, training, epochs=EPOCHS, seed=seed, shift=1, flip=False)
                scores.append(accuracy(model, test, batch=len(test[1])))
            means[count] = statistics.fmean(scores)
            check.note(f"{name} at N = {count}: {scores}")
        check.require(f"accuracy of the {name} at N = 2, mean of 3 seeds", means[2], ">=", TWO, unit="%")
        check.require("the same at N = 8, chance is 10%", means[8], ">=", EIGHT, unit="%")
    check.require("time for an image at N = 4 over that at N = 1", time_ratio(), "<=", TIME)
