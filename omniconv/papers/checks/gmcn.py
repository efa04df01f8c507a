"""Networks of Gaussian mixtures convolve exactly and without a grid; a ReLU is fitted to them, and they are reduced,
well enough to read digits.

Random mixtures have positions in a box, deviations from 0.4 to 0.9 and normal weights. The network reads MNIST digits
as 32 Gaussians each, trained on 2000 of them and tested on 2000 others.
"""

import gzip
import itertools
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn import functional as F

from omniconv.core.seeds import derive, generator
from omniconv.layers.conv.gaussian_mixture import (
    GaussianMixtureConv,
    GaussianMixtureNorm,
    GaussianMixtureReLU,
)
from omniconv.ops.gaussian_mixture import (
    convolve,
    evaluate,
    exhaustive_em,
    fit_relu,
    from_images,
    integrate,
    pack,
    tree_hem,
    unpack,
)
from omniconv.papers.check import Check, shared_data

QUADRATURE_ERROR = 1e-4
MOTION_ERROR = 1e-8
RELU_ERROR = 0.15
EM_RATIO = 1.3
EM_SPEEDUP = 3.0
ACCURACY = 85.0
SEEDS = (0, 1, 2)
COMPONENTS, STEPS, BATCH, LEARNING_RATE = 32, 120, 32, 0.02
GAIN = 50.0


def draw(shape: tuple[int, ...], d: int, seed: int, box: float, signed: bool = True) -> Tensor:
    """Return a random mixture of `shape` (N, F, K) in d dimensions."""
    random = torch.Generator().manual_seed(seed)
    weights = torch.randn(shape, generator=random, dtype=torch.float64)
    positions = box * (2 * torch.rand(*shape, d, generator=random, dtype=torch.float64) - 1)
    axes, _ = torch.linalg.qr(torch.randn(*shape, d, d, generator=random, dtype=torch.float64))
    deviations = 0.4 + 0.5 * torch.rand(*shape, d, generator=random, dtype=torch.float64)
    covariances = axes @ torch.diag_embed(deviations**2) @ axes.mT
    return pack(weights if signed else weights.abs(), positions, covariances)


def grid(d: int, reach: float, count: int) -> tuple[Tensor, float]:
    """Return the points of a grid and the volume of its cells."""
    axis = torch.linspace(-reach, reach, count, dtype=torch.float64)
    points = torch.stack(torch.meshgrid(*[axis] * d, indexing="ij"), -1).flatten(0, -2)
    return points, float(axis[1] - axis[0]) ** d


def quadrature_error(d: int) -> float:
    """Return the relative difference of a convolution at twenty points from its integral on a grid."""
    mixture, kernels = draw((1, 2, 4), d, d, 1.5), draw((3, 2, 3), d, d + 10, 1)
    points, cell = grid(d, 6, 121 if d == 2 else 61)
    x = 4 * torch.rand(20, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 2
    data = evaluate(mixture, points)[0]
    shifted = (x[:, None] - points).flatten(0, 1)
    windows = evaluate(kernels, shifted).unflatten(-1, (len(x), -1))
    expected = torch.einsum("fp,ofxp->ox", data, windows) * cell
    return float((evaluate(convolve(mixture, kernels), x)[0] - expected).norm() / expected.norm())


def moved(mixture: Tensor, rotation: Tensor, by: Tensor) -> Tensor:
    """Return the mixture rotated about the origin, then shifted."""
    weights, positions, covariances = unpack(mixture)
    return pack(weights, positions @ rotation.T + by, rotation @ covariances @ rotation.T)


def motion_error(d: int) -> float:
    """Return how far a convolution of the moved data with the rotated kernels is from the moved convolution."""
    mixture, kernels = draw((1, 2, 4), d, 3, 2), draw((3, 2, 3), d, 4, 1)
    rotation, _ = torch.linalg.qr(torch.randn(d, d, generator=generator(0, "rotation"), dtype=torch.float64))
    by = torch.arange(1.0, d + 1, dtype=torch.float64)
    got = convolve(moved(mixture, rotation, by), moved(kernels, rotation, 0 * by))
    return float((got - moved(convolve(mixture, kernels), rotation, by)).abs().max())


def relative_errors(mixture: Tensor, wanted: Tensor, points: Tensor) -> float:
    """Return the mean over mixtures of the relative L2 difference from the wanted values."""
    error = (evaluate(mixture, points) - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    return float(error.mean())


def relu_errors() -> dict[str, float]:
    """Return the errors of the fitted ReLU, of clipped weights, and of the best weights for the same Gaussians."""
    mixture = draw((50, 1, 24), 2, 0, 3)
    points, _ = grid(2, 6, 81)
    wanted = evaluate(mixture, points).relu()
    weights, positions, covariances = unpack(mixture)
    clipped = pack(weights.relu(), positions, covariances)
    single = [
        pack(
            torch.ones_like(weights[..., i : i + 1]),
            positions[..., i : i + 1, :],
            covariances[..., i : i + 1, :, :],
        )
        for i in range(24)
    ]
    basis = torch.stack([evaluate(m, points) for m in single], -1)
    best = torch.linalg.lstsq(basis, wanted[..., None]).solution[..., 0]
    return {
        "fitted": relative_errors(fit_relu(mixture), wanted, points),
        "clipped": relative_errors(clipped, wanted, points),
        "best": relative_errors(pack(best, positions, covariances), wanted, points),
    }


def reduction() -> tuple[dict[str, float], dict[str, float]]:
    """Return errors and median seconds of TreeHEM and of exhaustive EM, from 512 components to 16."""
    mixture = draw((4, 2, 512), 2, 1, 5, signed=False)
    points, _ = grid(2, 7, 61)
    wanted = evaluate(mixture, points)
    ways: dict[str, Callable[[Tensor, int], Tensor]] = {"tree": tree_hem, "exhaustive": exhaustive_em}
    errors = {name: relative_errors(way(mixture, 16), wanted, points) for name, way in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(7):
        for name, way in ways.items():
            started = time.perf_counter()
            way(mixture, 16)
            times[name].append(time.perf_counter() - started)
    return errors, {name: statistics.median(rounds) for name, rounds in times.items()}


def gradients_are_right() -> bool:
    """Return whether first derivatives of convolution, ReLU fit and TreeHEM are those of finite differences."""
    mixture, kernels = (draw(shape, 2, 5, 2).requires_grad_() for shape in ((1, 2, 9), (2, 2, 2)))
    bias = torch.tensor([0.1, -0.2], dtype=torch.float64, requires_grad=True)

    def layer(mixture: Tensor, kernels: Tensor, bias: Tensor) -> Tensor:
        return tree_hem(fit_relu(convolve(mixture, kernels), bias), 4)

    return gradcheck(convolve, (mixture, kernels)) and gradcheck(
        layer, (mixture, kernels, bias), fast_mode=True
    )


def digits() -> tuple[Tensor, Tensor]:
    """Return the first 4000 test images of MNIST (N, 1, 28, 28), from 0 to 1, and their labels."""
    folder = shared_data("mnist")
    pixels = gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes())
    images = np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 1, 28, 28)[:4000]
    return torch.tensor(images) / 255, torch.tensor(np.frombuffer(labels, np.uint8, offset=8)[:4000]).long()


class Network(nn.Module):
    """Three convolutions, each with norm and ReLU; the last mixtures' integrals are the logits."""

    def __init__(self, widths: tuple[int, ...] = (1, 5, 6, 10)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        stages = zip(itertools.pairwise(widths), (8, 4, None), (2.0, 3.0, 4.0), strict=True)
        for (inside, outside), components, radius in stages:
            layers += [
                GaussianMixtureConv(inside, outside, kernel_components=3, radius=radius),
                GaussianMixtureNorm(outside, gain=GAIN),
                GaussianMixtureReLU(outside, components),
            ]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], 10)
        nn.init.eye_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of mixtures."""
        return self.head(integrate(self.layers(x)) * 10 / GAIN)


def accuracy(seed: int, mixtures: Tensor, labels: Tensor) -> float:
    """Train on the first 2000 mixtures and return the accuracy on the others in percent."""
    torch.manual_seed(derive(seed, "weights"))
    random, network = generator(seed, "train"), Network()
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.2)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(STEPS):
        if len(order) < BATCH:
            order = torch.cat([order, torch.randperm(2000, generator=random)])
        chosen, order = order[:BATCH], order[BATCH:]
        loss = F.cross_entropy(network(mixtures[chosen]), labels[chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        found = torch.cat([network(x) for x in mixtures[2000:].split(100)]).argmax(1)
    return 100 * float((found == labels[2000:]).float().mean())


def run(check: Check) -> None:
    """Measure exactness, the two fits, memory, and a network on digits."""
    for d in (2, 3):
        check.require(
            f"relative difference of convolution from quadrature, {d}D",
            quadrature_error(d),
            "<=",
            QUADRATURE_ERROR,
        )
        check.require(f"error of commuting with motions, {d}D", motion_error(d), "<=", MOTION_ERROR)
    check.require("gradients equal finite differences", gradients_are_right(), "==", True)

    errors = relu_errors()
    check.require(
        "relative L2 error of the ReLU fit, mean of 50 mixtures", errors["fitted"], "<", RELU_ERROR,
        baseline=errors["clipped"],
    )  # fmt: skip
    check.require("the same over that of clipped weights", errors["fitted"] / errors["clipped"], "<", 1.0)
    check.note(f"ReLU fits: {errors}; best: the weights of least squares on the grid, for the same Gaussians")

    errors, seconds = reduction()
    check.require(
        "error of TreeHEM over that of exhaustive EM, 512 to 16 components", errors["tree"] / errors["exhaustive"],
        "<=", EM_RATIO, baseline=errors["exhaustive"],
    )  # fmt: skip
    check.require(
        "times as fast as exhaustive EM of 20 steps",
        seconds["exhaustive"] / seconds["tree"],
        ">=",
        EM_SPEEDUP,
    )

    images, labels = digits()
    large = F.interpolate(images[:1], scale_factor=4.0)
    sizes = [from_images(x, COMPONENTS).numel() for x in (images[:1], large)]
    check.require("numbers that hold a picture of 112 pixels over those of 28", sizes[1] / sizes[0], "==", 1)
    with torch.no_grad():
        mixtures = torch.cat([from_images(x, COMPONENTS) for x in images.split(100)])
    scores = [accuracy(seed, mixtures, labels) for seed in SEEDS]
    check.require("accuracy on digits, mean of 3 seeds", sum(scores) / len(scores), ">", ACCURACY, unit="%")
    check.note(f"accuracies: {scores}")
