"""A convolution whose taps are functions, sums of a basis, is one convolution over expanded pixels with the published
number of weights; chosen degrees train alone, and a net of two such layers reads digits.

Layers are compared with a loop over taps that evaluates each function for each pixel. The digits are scikit-learn's, of
8 x 8 pixels; the two-layer network is compared with ordinary convolutions under the same recipe.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from omniconv.core.seeds import derive
from omniconv.layers.conv.ka_bases import Basis, Bernstein, BSplines, Gaussians, Polynomials, Wavelets
from omniconv.layers.conv.kaconv import BottleneckKAConv2d, KAConv2d, train_degrees
from omniconv.papers.check import Check
from omniconv.papers.small import accuracy, digits, train

BASIS_ERROR, LOOP_ERROR, REDUCTION_ERROR = 1e-6, 1e-5, 1e-6
BOTTLENECK = 1 / 3
ACCURACY = 97.0
SEEDS = (0, 1, 2)

FAMILIES = ("chebyshev", "fibonacci", "gram", "hermite", "jacobi", "legendre", "lucas")
BASES: tuple[Basis, ...] = (
    BSplines(), Gaussians(8), Wavelets(4), Bernstein(3), *(Polynomials(family) for family in FAMILIES)
)  # fmt: skip


def formula_errors() -> int:
    """Return for how many bases the weights are not k^2 C_in C_out (functions + 1), besides what is learned of them."""
    wrong = 0
    for basis in BASES:
        functions = 8 if isinstance(basis, BSplines | Gaussians) else 4  # grid 5 + order 3; degree 3 + 1
        layer = KAConv2d(6, 10, 3, basis=basis)
        count = sum(p.numel() for p in layer.parameters()) - len(basis.start)
        wrong += count != 9 * 60 * (functions + 1)
    return wrong


def bottleneck_share() -> float:
    """Return the bottleneck's parameters as a share of the full Gram layer's, at 256 channels and degree 3."""
    layers = BottleneckKAConv2d(256, 256, 3, device="meta"), KAConv2d(256, 256, 3, device="meta")
    small, full = (sum(p.numel() for p in layer.parameters()) for layer in layers)
    return small / full


def truths() -> dict[str, Callable[[int, np.ndarray], np.ndarray]]:
    """Return the polynomials of degree n by closed forms."""
    from scipy import special

    def fibonacci(n: int, t: np.ndarray) -> np.ndarray:
        return np.asarray(sum(math.comb(n - k, k) * t ** (n - 2 * k) for k in range(n // 2 + 1)))

    def lucas(n: int, t: np.ndarray) -> np.ndarray:
        root = np.sqrt(t * t + 4)
        return ((t + root) / 2) ** n + ((t - root) / 2) ** n

    def monic(n: int, t: np.ndarray) -> np.ndarray:
        return special.eval_legendre(n, t) / special.legendre(n).coeffs[0]

    return {
        "chebyshev": special.eval_chebyt, "fibonacci": fibonacci, "gram": monic, "hermite": special.eval_hermite,
        "jacobi": lambda n, t: special.eval_jacobi(n, 1, 1, t), "legendre": special.eval_legendre, "lucas": lucas,
    }  # fmt: skip


def basis_error() -> float:
    """Return the largest difference of the polynomials up to degree 5, and B-splines, from scipy and closed forms."""
    from scipy.interpolate import BSpline
    from scipy.stats import binom

    x = torch.linspace(-3, 3, 301, dtype=torch.float64)
    t, worst = np.tanh(x.numpy()), 0.0
    for family, truth in truths().items():
        basis = Polynomials(family, 5)  # pyright: ignore[reportArgumentType]
        values = basis(x, torch.tensor(basis.start, dtype=torch.float64))
        worst = max(
            worst, *(float(np.abs(value.numpy() - truth(n, t)).max()) for n, value in enumerate(values))
        )
    for i, value in enumerate(Bernstein(5)(x, torch.empty(0))):
        worst = max(worst, float(np.abs(value.numpy() - binom.pmf(i, 5, (1 + t) / 2)).max()))
    knots = -1 + 0.4 * np.arange(-3, 9)
    for i, value in enumerate(BSplines()(x, torch.empty(0))):
        spline = BSpline.basis_element(knots[i : i + 5], extrapolate=False)(x.numpy())
        worst = max(worst, float(np.abs(value.numpy() - np.nan_to_num(spline)).max()))
    return worst


def partition_error() -> float:
    """Return how far the B-splines' sum is from one inside their grid."""
    x = torch.linspace(-1, 1, 1001, dtype=torch.float64)[:-1]
    return float((torch.stack(BSplines()(x, torch.empty(0))).sum(0) - 1).abs().max())


@torch.no_grad()
def loop_error() -> float:
    """Return the largest difference of any layer from a loop over its taps and functions."""
    worst = 0.0
    for basis in BASES:
        torch.manual_seed(0)
        layer, x = KAConv2d(2, 3, 3, basis=basis), torch.randn(2, 2, 6, 5)
        assert layer.base is not None
        learned = torch.tensor(basis.start)
        expected = torch.zeros(2, 3, 4, 3)
        for o, c, u, v in np.ndindex(3, 2, 3, 3):
            pixels = x[:, c, u : u + 4, v : v + 3]
            expected[:, o] += layer.base[o, c, u, v] * pixels * pixels.sigmoid()
            for weight, value in zip(layer.weights, basis(pixels, learned), strict=True):
                expected[:, o] += weight[o, c, u, v] * value
        worst = max(worst, float((layer(x) - expected).abs().max()))
    return worst


@torch.no_grad()
def reduction_error() -> float:
    """Return how far degree 1 without base is from an ordinary convolution of tanh(x), the constant as its bias."""
    torch.manual_seed(0)
    layer, x = KAConv2d(3, 4, 3, basis=Polynomials("chebyshev", 1), act=None), torch.randn(2, 3, 8, 7)
    constant, slope = layer.weights
    return float((layer(x) - F.conv2d(x.tanh(), slope, constant.sum((1, 2, 3)))).abs().max())


def changed_while_frozen() -> int:
    """Return how many frozen values of a layer change when degree 3 alone is trained."""
    torch.manual_seed(0)
    layer = KAConv2d(3, 4, 3)
    train_degrees(layer, [3])
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    optimizer = torch.optim.AdamW(layer.parameters(), 1e-2, weight_decay=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        (layer(torch.randn(4, 3, 8, 8)) - 1).square().mean().backward()
        optimizer.step()
    changed = {name: int((p != before[name]).sum()) for name, p in layer.named_parameters()}
    moved = changed.pop("weights.3")
    # Nothing would be shown if the trained degree stayed too.
    return sum(changed.values()) if moved else -1


def make_network(seed: int, layer: Callable[[int, int], nn.Module]) -> nn.Module:
    """Return a network of two layers and a classifier."""
    torch.manual_seed(derive(seed, "weights"))
    return nn.Sequential(
        layer(1, 16), nn.BatchNorm2d(16), nn.MaxPool2d(2), layer(16, 32), nn.BatchNorm2d(32),
        nn.Flatten(), nn.Linear(32 * 16, 10),
    )  # fmt: skip


def functions(channels: int, out: int) -> nn.Module:
    """Return a layer of Gram polynomials."""
    return KAConv2d(channels, out, 3, padding=1)


def ordinary(channels: int, out: int) -> nn.Module:
    """Return a convolution and its activation."""
    return nn.Sequential(nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.SiLU())


def run(check: Check) -> None:
    """Measure counts, bases, layers, chosen degrees and a small training."""
    check.require(
        "bases whose layers have another number of weights than published", formula_errors(), "==", 0
    )
    check.require("parameters of the bottleneck over the full layer's", bottleneck_share(), "<", BOTTLENECK)
    check.require("difference of the bases from scipy and closed forms", basis_error(), "<=", BASIS_ERROR)
    check.require(
        "difference of the B-splines' sum from one inside the grid", partition_error(), "<=", BASIS_ERROR
    )
    check.require("difference of all layers from a loop over their functions", loop_error(), "<=", LOOP_ERROR)
    check.require(
        "difference of degree 1 from a convolution of tanh(x)", reduction_error(), "<=", REDUCTION_ERROR
    )
    check.require("frozen values that change while one degree is trained", changed_while_frozen(), "==", 0)

    training, test = digits()
    scores: dict[str, list[float]] = {"functions": [], "ordinary": []}
    for seed in SEEDS:
        for name, layer in (("functions", functions), ("ordinary", ordinary)):
            model = make_network(seed, layer)
            train(model, training, epochs=30, seed=seed, shift=1, flip=False)
            scores[name].append(accuracy(model, test))
    means = {name: sum(values) / len(values) for name, values in scores.items()}
    check.require(
        "accuracy of two layers on handwritten digits, mean of 3 seeds",
        means["functions"], ">=", ACCURACY, baseline=means["ordinary"], unit="%",
    )  # fmt: skip
    check.note(f"accuracies {scores}; the baseline is ordinary convolutions of the same width")
