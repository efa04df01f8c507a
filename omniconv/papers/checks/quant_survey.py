"""Each bit of a uniform quantizer adds 6.02 dB, whole numbers equal the simulation bit for bit, and the survey's
orderings hold: 8 bits cost next to nothing, steps by channel beat one for the tensor, clipped ranges beat the
extremes where there are outliers, and training recovers half of what 3 bits lose.

The network, three convolutions with batch norm and a classifier of 33,738 parameters, sees Fashion-MNIST averaged to
14 x 14 pixels: 10,000 images for training, 4,000 of the test set, 256 to calibrate with. Outliers: one in a thousand
pixels of the calibration images is 20 times as large. Training with 3 bits has one epoch more, at a tenth of the
rate. Accuracies are in percent, each ordering must hold for each of three seeds.

The symmetric quantizer was measured first with the restricted range of runtimes, whose 2^k - 2 steps instead of 2^k - 1
gain 6.32 dB a bit between 3 and 10 bits: 0.30 from 6.02, where 0.2 are allowed. The survey has both ranges; the full
one, which was missing, was added for this reason, and the other's figure is noted with every measurement.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.compress.quantize.bench import bench, weight_bytes
from omniconv.compress.quantize.formats import Integer
from omniconv.compress.quantize.integer import integer_network
from omniconv.compress.quantize.layers import freeze
from omniconv.compress.quantize.quantize import fake_quantize, quantize
from omniconv.compress.quantize.quantizer import Quantizer, Scheme
from omniconv.core.seeds import generator
from omniconv.papers.check import Check
from omniconv.papers.small import Split, accuracy, fashion_mnist, train

DECIBELS, TOLERANCE = 6.02, 0.2
INT8_DROP = 0.5
RECOVERED = 0.5
SMALLER = {8: 3.9, 4: 7.6}
SEEDS = (0, 1, 2)
BATCH, LR = 64, 4e-3


def network(widths: tuple[int, ...] = (16, 32, 64)) -> nn.Sequential:
    """Return convolutions, each with batch norm and ReLU, of stride 2 but the first, and a classifier."""
    layers: list[nn.Module] = []
    channels, size = 1, 14
    for index, width in enumerate(widths):
        stride = 2 if index in (1, 2) else 1
        layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels, size = width, -(-size // stride)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * size * size, 10))


def small_pictures(count: int, test: int) -> tuple[Split, Split]:
    """Return Fashion-MNIST averaged to 14 x 14 pixels."""
    (x, y), (tx, ty) = fashion_mnist(count, test)
    return (F.avg_pool2d(x, 2), y), (F.avg_pool2d(tx, 2), ty)


def trained(
    seed: int, data: Split, epochs: float = 3, widths: tuple[int, ...] = (16, 32, 64)
) -> nn.Sequential:
    """Return a network after training."""
    torch.manual_seed(seed)
    model = network(widths)
    train(model, data, epochs=epochs, batch=BATCH, lr=LR, seed=seed, shift=1)
    return model.eval()


def decibels_per_bit(symmetric: bool, full: bool = True) -> float:
    """Return the slope of the signal-to-noise ratio of uniform noise over 3 to 10 bits."""
    x = torch.rand(200_000, generator=generator(0, "noise"), dtype=torch.float64) * 2 - 1
    bits, ratios = range(3, 11), []
    for k in bits:
        quantizer = Quantizer(Scheme(Integer(k, signed=symmetric), symmetric=symmetric, full=full)).double()
        quantizer.calibrate(x)
        ratios.append(float(10 * torch.log10(x.square().mean() / (quantizer(x) - x).square().mean())))
    return float(np.polyfit(list(bits), ratios, 1)[0])


def codes_that_differ(model: nn.Sequential, images: Tensor, test: Tensor) -> tuple[int, int]:
    """Return how many codes between layers, and answers, differ between whole numbers and the simulation."""
    whole, simulated = integer_network(fake_quantize(model, images))
    found = iter(whole.codes(test))
    differ = 0

    def compare(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal differ
        differ += int((layer.input_quantizer.encode(args[0]) != next(found)).sum())  # type: ignore[operator,union-attr]

    for layer in simulated:
        if hasattr(layer, "input_quantizer"):
            layer.register_forward_pre_hook(compare)
    with torch.no_grad():
        answers = simulated(test.double()).argmax(1)
    return differ, int((whole(test).argmax(1) != answers).sum())


def with_outliers(images: Tensor) -> Tensor:
    """Return images of which one pixel in a thousand is 20 times as large."""
    hit = torch.rand(images.shape, generator=generator(0, "outliers")) < 1e-3
    return torch.where(hit, 20 * images, images)


def by_channel(bits: int, span: str = "minmax") -> Scheme:
    """Return symmetric weights with a step a channel."""
    return Scheme(Integer(bits), per="channel", range=span)  # type: ignore[arg-type]


def activations(bits: int, span: str) -> Scheme:
    """Return unsigned activations with a zero point."""
    return Scheme(Integer(bits, signed=False), symmetric=False, range=span)  # type: ignore[arg-type]


def run(check: Check) -> None:
    """Measure the claim."""
    for symmetric in (True, False):
        slope = decibels_per_bit(symmetric)
        name = "symmetric" if symmetric else "asymmetric"
        check.require(
            f"distance of the {name} quantizer's decibels a bit from {DECIBELS}", abs(slope - DECIBELS), "<=",
            TOLERANCE, unit="dB",
        )  # fmt: skip
    check.note(f"Symmetric with the restricted range: {decibels_per_bit(True, full=False):.2f} dB a bit.")
    data, test = small_pictures(10_000, 4_000)
    calibration = data[0][:256]
    gains: dict[str, list[float]] = {"int8": [], "channel": [], "mse": [], "percentile": [], "training": []}
    for seed in SEEDS:
        model = trained(seed, data)
        full = accuracy(model, test)
        score = lambda m: accuracy(m, test)  # noqa: E731
        if seed == 0:
            differ, answers = codes_that_differ(model, calibration, test[0][:1000])
            check.require("codes between layers that differ from the simulation's", differ, "==", 0)
            check.require("answers that differ from the simulation's", answers, "==", 0)
            floats = (
                sum(p.numel() for m in model if isinstance(m, nn.Conv2d | nn.Linear) for p in [m.weight]) * 4
            )
            for bits, wanted in SMALLER.items():
                packed = weight_bytes(quantize(model, weights=bits, activations=None)[0])
                check.require(f"times smaller in {bits} bits, scales included", floats / packed, ">=", wanted)
            rows = bench(model, calibration, score)
            figures = (f"{r.name} {r.score:.2f}% {r.bytes:,} B {r.bit_operations / 1e6:.1f}M" for r in rows)
            check.note(f"Accuracy, file and bit operations, seed 0: {'; '.join(figures)}.")
        gains["int8"].append(full - score(quantize(model, calibration)[0]))
        channel, tensor = (
            score(quantize(model, weights=scheme, activations=None)[0])
            for scheme in (by_channel(4), Scheme(Integer(4)))
        )
        gains["channel"].append(channel - tensor)
        spoilt = with_outliers(calibration)
        spans = {
            span: score(quantize(model, spoilt, weights=8, activations=activations(4, span))[0])
            for span in ("minmax", "mse", "percentile")
        }
        for span in ("mse", "percentile"):
            gains[span].append(spans[span] - spans["minmax"])
        after = score(quantize(model, calibration, weights=3, activations=3)[0])
        learner = fake_quantize(model, calibration, weights=3, activations=3, learn_scales=True)
        train(learner, data, epochs=1, batch=BATCH, lr=LR / 10, seed=100 + seed, shift=1)
        gains["training"].append((score(freeze(learner)) - after) / max(full - after, 1e-9))
        check.note(
            f"Seed {seed}: float {full:.2f}%; 4-bit weights by channel {channel:.2f}%, by tensor {tensor:.2f}%; 4-bit "
            f"activations with outliers {spans}; 3 bits {after:.2f}%."
        )
    worst = {name: min(values) for name, values in gains.items()}
    check.require("points lost in int8, worst seed", max(gains["int8"]), "<", INT8_DROP, unit="points")
    check.require(
        "4-bit weights: by channel over by tensor, worst seed", worst["channel"], ">", 0.0, unit="points"
    )
    for span in ("mse", "percentile"):
        check.require(
            f"outliers, 4-bit activations: {span} over the extremes, worst seed",
            worst[span],
            ">",
            0.0,
            unit="points",
        )
    check.require(
        "share of the loss in 3 bits that training recovers, worst seed", worst["training"], ">=", RECOVERED
    )
