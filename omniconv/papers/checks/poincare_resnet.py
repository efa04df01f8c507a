"""A residual network can stay in the Poincare ball throughout: its maps and sums are exact, their own backward
passes keep less memory, half an identity keeps activations alive where normal weights let them vanish, the midpoint
takes the Frechet mean's place at a fraction of its time, and a small network learns digits.

The norm of activations is measured through 20 linear layers of 16 features, the layer to which the paper's argument
applies; a convolution that starts as a rectangular identity sees one ninth of its patch, which is noted beside it.
The Frechet mean is a Karcher flow, with steps cut by the mean curvature of its objective, until it moves by less
than 1e-6, in the same arithmetic. The net of 8 layers (8, 16 and
32 channels) sees the 8 x 8 digits.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.layers.geometry.poincare import PoincareConv2d, PoincareLinear
from omniconv.models.factory import create_model
from omniconv.ops.poincare import distance, expmap, expmap0, logmap, logmap0, midpoint, mobius_add
from omniconv.papers.check import Check
from omniconv.papers.small import accuracy, digits, train

C = 0.1
EXACT = 1e-10
BACKWARD_ERROR = 1e-8
KEPT_FACTOR, LOST_FACTOR = 2.0, 1e-3
EUCLIDEAN_ERROR = 1e-4
MIDPOINT_ERROR = 0.05
SPEED = 3.0
ACCURACY = 90.0
SEEDS = (0, 1, 2)
EPOCHS, RATE = 16, 5e-3


def plain_expmap0(v: Tensor) -> Tensor:
    """The exponential map as autograd differentiates it."""
    s = C**0.5 * v.norm(dim=-1, keepdim=True)
    return s.tanh() * v / s


def plain_logmap0(y: Tensor) -> Tensor:
    """The logarithm as autograd differentiates it."""
    s = C**0.5 * y.norm(dim=-1, keepdim=True)
    return s.atanh() * y / s


def plain_add(x: Tensor, y: Tensor) -> Tensor:
    """The Mobius sum as autograd differentiates it."""
    x2, y2, xy = (a.sum(-1, keepdim=True) for a in (x * x, y * y, x * y))
    return ((1 + 2 * C * xy + C * y2) * x + (1 - C * x2) * y) / (1 + 2 * C * xy + C**2 * x2 * y2)


def with_memory(form: Callable[..., Tensor], *inputs: Tensor) -> tuple[list[Tensor], int]:
    """Return output and gradients, and the bytes kept for the backward pass."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    leaves = [x.clone().requires_grad_() for x in inputs]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = form(*leaves)
    weights = torch.cos(torch.arange(output.numel(), dtype=output.dtype)).view(output.shape)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), leaves)], sum(kept.values())


def check_manifold(check: Check) -> None:
    """Measure maps, sums and backward passes in float64."""
    torch.manual_seed(0)
    v, w = torch.randn(2, 500, 16, dtype=torch.float64).unbind()
    x, y = expmap0(v, C), expmap0(w, C)
    check.require("logarithm of the exponential: error", float((logmap0(x, C) - v).abs().max()), "<=", EXACT)
    error = float((mobius_add(-x, mobius_add(x, y, C), C) - y).abs().max())
    check.require("left cancellation -x + (x + y) = y: error", error, "<=", EXACT)
    error = float((distance(x, y, C) - distance(y, x, C)).abs().max())
    check.require("symmetry of the distance: error", error, "<=", EXACT)
    for name, own, plain, inputs in (
        ("exponential", lambda v: expmap0(v, C), plain_expmap0, (v,)),
        ("logarithm", lambda y: logmap0(y, C), plain_logmap0, (x,)),
        ("Mobius sum", lambda x, y: mobius_add(x, y, C), plain_add, (x, y)),
    ):
        (found, kept), (expected, usual) = with_memory(own, *inputs), with_memory(plain, *inputs)
        error = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
        check.require(
            f"{name}: difference of values and gradients from autograd", error, "<=", BACKWARD_ERROR
        )
        check.require(
            f"{name}: bytes kept for the backward pass over autograd's", kept / usual, "<", 1, baseline=usual
        )  # fmt: skip


def remaining(make: Callable[[], nn.Module], x: Tensor, *, normal: bool) -> float:
    """Return the mean norm of tangents after 20 new layers, over that before."""
    start = x.norm(dim=1).mean()
    for _ in range(20):
        layer = make()
        weight = layer.get_parameter("weight")
        if normal:
            nn.init.normal_(weight, std=(2 * weight.numel()) ** -0.5)
        with torch.no_grad():
            x = layer(x)
    return float(x.norm(dim=1).mean() / start)


def check_layers(check: Check) -> None:
    """Measure initial weights and the limit without curvature."""
    torch.manual_seed(0)
    x = torch.randn(64, 16)
    for normal, relation, limit in ((False, ">=", 1 / KEPT_FACTOR), (True, "<", LOST_FACTOR)):
        factor = remaining(lambda: PoincareLinear(16, 16, C), x, normal=normal)
        title = "normal weights" if normal else "half an identity"
        check.require(f"norm after 20 layers over that before, {title}", factor, relation, limit)  # type: ignore[arg-type]
        if not normal:
            check.require("the same, from above", factor, "<=", KEPT_FACTOR)
    factor = remaining(lambda: PoincareConv2d(16, 16, c=C), torch.randn(4, 16, 8, 8), normal=False)
    check.note(f"through 20 convolutions that start as half an identity {factor:.2g} of the norm is left")
    layer = PoincareConv2d(8, 12, c=1e-9).double()
    nn.init.normal_(layer.weight, std=0.2)
    assert layer.bias is not None
    nn.init.normal_(layer.bias, std=0.2)
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    bias = -2 * layer.weight.flatten(1).norm(dim=1) * layer.bias
    expected = F.conv2d(layer.gain * x, 2 * layer.weight, bias, padding=1)
    error = float((layer(x) - expected).detach().abs().max())
    check.require("difference from a Euclidean convolution at c = 1e-9", error, "<=", EUCLIDEAN_ERROR)


def frechet_mean(x: Tensor) -> Tensor:
    """Return the point of least mean squared distance from points (N, C)."""
    mean = x.mean(0, keepdim=True)
    for _ in range(200):
        # The curvature of d^2 / 2 is s coth s for points at distance s: a whole step would overshoot.
        s = C**0.5 * distance(mean, x, C)
        step = logmap(mean, x, C).mean(0, keepdim=True) / (s / s.tanh()).mean()
        mean = expmap(mean, step, C)
        if float(step.norm()) < 1e-6:
            break
    return mean


def check_midpoint(check: Check) -> None:
    """Compare midpoint and Frechet mean."""
    torch.manual_seed(0)
    pair = expmap0(torch.randn(2, 16, dtype=torch.float64), C)
    half = torch.randn(200, 16, dtype=torch.float64)
    symmetric = torch.cat((expmap0(half, C), -expmap0(half, C)))
    for name, points in (("two points", pair), ("points and their opposites", symmetric)):
        apart = float(distance(midpoint(points, C, 0), frechet_mean(points), C))
        check.require(f"midpoint and Frechet mean of {name} apart by", apart, "<=", 1e-5)
    points = expmap0(torch.randn(2000, 16) + 0.5, C)
    mean = frechet_mean(points)
    spread = distance(points, mean, C).square().mean().sqrt()
    apart = float(distance(midpoint(points, C, 0), mean, C) / spread)
    check.require("the same of 2000 points, over their spread", apart, "<=", MIDPOINT_ERROR)
    seconds: dict[str, list[float]] = {"midpoint": [], "mean": []}
    for _ in range(15):
        for name, form in (
            ("midpoint", lambda: midpoint(points, C, 0)),
            ("mean", lambda: frechet_mean(points)),
        ):
            begin = time.perf_counter()
            form()
            seconds[name].append(time.perf_counter() - begin)
    faster = statistics.median(seconds["mean"]) / statistics.median(seconds["midpoint"])
    check.require("time of the Frechet mean over that of the midpoint", faster, ">=", SPEED)


def run(check: Check) -> None:
    """Measure the manifold, the layers, the midpoint, and a small training."""
    check_manifold(check)
    check_layers(check)
    check_midpoint(check)
    training, test = digits()
    scores = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        model = create_model("hyperbolic_8_16_32_resnet20", depth=1, num_classes=10, in_chans=1)
        train(model, training, epochs=EPOCHS, lr=RATE, seed=seed, shift=1, flip=False)
        scores.append(accuracy(model, test))
    mean = sum(scores) / len(scores)
    check.require("accuracy of 8 layers on digits, mean of 3 seeds", mean, ">=", ACCURACY, unit="%")
    check.note(f"accuracies {scores}")
