"""A matrix of functions of tree distances is multiplied exactly in near-linear time, several times faster than it can
be written out, and so gives linear attention a mask of three parameters that no one forms.

Brute force gets the same care: a compiled loop for all distances, then torch for the function and the product. Both
sides are timed from the edges on, with everything compiled beforehand, on fields of three columns.
"""

import math
import statistics
import time
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from omniconv.layers.attention.topological import TopologicalAttention
from omniconv.ops.tree_field.api import tree_field
from omniconv.ops.tree_field.functions import (
    Cosine,
    Exponential,
    ExponentiatedPolynomial,
    Polynomial,
    Rational,
)
from omniconv.ops.tree_field.tree import IntegratorTree
from omniconv.papers.check import Check

ERROR = 1e-6
ACCURATE_SIZES = (50, 500, 4000)
SLOPE = 1.35
BRUTE_SLOPE = 1.9
SPEEDUP = 3.0
SIZES = (1000, 2000, 4000, 8000, 16000)
BRUTE_SIZES = SIZES[:4]
ROUNDS = 3
MASK_ERROR = 1e-5
MASK_PARAMETERS = 3
GRADIENT_ERROR = 1e-6


def numbers(*values: float) -> Tensor:
    """Return a float64 tensor."""
    return torch.tensor(values, dtype=torch.float64)


MAKERS: dict[str, tuple[Callable[[Tensor], Callable[[Tensor], Tensor]], Tensor, bool]] = {
    "polynomial": (Polynomial, numbers(0.3, -0.2, 0.05, 0.01), False),
    "exponential": (lambda a: Exponential(a[0], a[1]), numbers(-0.3, 2), False),
    "cosine": (lambda a: Cosine(a[0], a[1]), numbers(0.7, 0.3), False),
    "rational": (lambda a: Rational(a[:1], a[1:]), numbers(1, 1, 0.2, 0.7), False),
    "exponentiated quadratic": (ExponentiatedPolynomial, numbers(0.1, -0.05, -0.02), True),
}
"""Name -> how the function is made of its parameters, these, and whether the weights are whole numbers."""


def draw_tree(n: int, whole: bool, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return edges and weights of a random tree: every vertex hangs from one drawn among those before it."""
    random = np.random.default_rng(seed)
    upto = np.arange(1, n)
    parents = (random.random(n - 1) * upto).astype(np.int64)
    weights = random.integers(1, 6, n - 1) if whole else random.uniform(0.1, 2, n - 1)
    return np.stack([parents, upto], 1), weights.astype(np.float64)


@cache
def compiled_distances() -> Callable[..., None]:
    """Return the compiled loop that fills a matrix row by row: up from i to the root, then down to everyone."""
    from numba import njit

    @njit
    def fill(parents, weights, result):
        for i in range(len(result)):
            up = i
            result[i, :] = -1
            result[i, i] = 0
            while up:
                result[i, parents[up - 1]] = result[i, up] + weights[up - 1]
                up = parents[up - 1]
            for j in range(1, len(result)):
                if result[i, j] < 0:
                    result[i, j] = result[i, parents[j - 1]] + weights[j - 1]

    return fill


def all_distances(edges: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the matrix of distances of a tree in which edge i joins vertex i + 1 to one before it."""
    result = np.empty((len(edges) + 1,) * 2)
    compiled_distances()(edges[:, 0].copy(), weights, result)
    return result


def brute_force(x: Tensor, edges: np.ndarray, weights: np.ndarray, f: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the integral by the whole matrix."""
    return f(torch.from_numpy(all_distances(edges, weights))) @ x


def fast(x: Tensor, edges: np.ndarray, weights: np.ndarray, f: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the integral, cutting the tree first."""
    return tree_field(x, IntegratorTree.of(edges, weights), f)


def field(n: int) -> Tensor:
    """Return a normal field of three columns."""
    return torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(n))


def seconds(way: Callable[..., Tensor], *arguments) -> float:
    """Return how long one call takes."""
    started = time.perf_counter()
    way(*arguments)
    return time.perf_counter() - started


def slope(times: dict[int, float]) -> float:
    """Return the exponent with which time grows with size, by least squares."""
    return float(np.polyfit([math.log(n) for n in times], [math.log(t) for t in times.values()], 1)[0])


def gradient_error(name: str) -> float:
    """Return the relative difference of the parameters' gradient from central differences."""
    make, values, whole = MAKERS[name]
    tree = IntegratorTree.of(*draw_tree(500, whole, 3))
    x, probe = field(500), field(501)[:500]

    def total(a: Tensor) -> Tensor:
        return (tree_field(x, tree, make(a)) * probe).sum()

    a = values.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(total(a), [a])
    step = 1e-6
    shifts = step * torch.eye(len(values), dtype=torch.float64)
    expected = torch.stack([(total(values + s) - total(values - s)) / (2 * step) for s in shifts])
    return float((gradient - expected).norm() / expected.norm())


def mask_error() -> float:
    """Return the largest relative difference of masked linear attention from the one with its mask written out."""
    worst = 0.0
    for size in ((14, 14), (9, 17)):
        torch.manual_seed(0)
        layer = TopologicalAttention(32, size, 4)
        with torch.no_grad():
            layer.mask.copy_(torch.tensor([-3.0, 2.0, -1.5]))
            n = size[0] * size[1]
            x = torch.randn(2, n, 32)
            z = tree_field(torch.eye(n), layer.tree, lambda z: z, method="dense") / sum(size)
            mask = torch.exp(-3 * z + 2 * z**2 - 1.5 * z**3)
            q, k, v = (t.reshape(2, n, 4, 8).transpose(1, 2) for t in layer.qkv(x).split(32, 2))
            scores = mask * ((F.elu(q) + 1) @ (F.elu(k) + 1).mT)
            y = (scores / scores.sum(-1, keepdim=True) @ v).transpose(1, 2).reshape(2, n, 32)
            expected = layer.proj(y)
            worst = max(worst, float((layer(x) - expected).abs().max() / expected.abs().max()))
    return worst


def run(check: Check) -> None:
    """Measure exactness, balance of the cuts, growth of time, the mask, and gradients."""
    outside = 0
    for name, (make, values, whole) in MAKERS.items():
        errors = []
        for n in ACCURATE_SIZES:
            edges, weights = draw_tree(n, whole, n)
            expected = brute_force(field(n), edges, weights, make(values))
            errors.append(
                float((fast(field(n), edges, weights, make(values)) - expected).norm() / expected.norm())
            )
            parts = IntegratorTree.of(edges, weights).parts
            of = parts.sum(1, keepdim=True) - 1
            outside += int(((4 * parts < of) | (4 * parts > 3 * of)).any(1).sum())
        check.require(f"relative error of {name}, trees of 50 to 4000", max(errors), "<=", ERROR)
    check.require("cuts with a part outside a quarter to three quarters", outside, "==", 0)

    times: dict[str, dict[int, float]] = {}
    brute: dict[str, dict[int, float]] = {}
    for name in ("exponential", "rational", "exponentiated quadratic"):
        make, values, whole = MAKERS[name]
        f = make(values)
        times[name], brute[name] = {}, {}
        for n in SIZES:
            x, (edges, weights) = field(n), draw_tree(n, whole, n)
            rounds: dict[Callable[..., Tensor], list[float]] = {fast: []}
            if n in BRUTE_SIZES:
                rounds[brute_force] = []
            for _ in range(ROUNDS):
                for way, measured in rounds.items():
                    measured.append(seconds(way, x, edges, weights, f))
            times[name][n] = statistics.median(rounds[fast])
            if n in BRUTE_SIZES:
                brute[name][n] = statistics.median(rounds[brute_force])
        check.require(f"growth exponent of {name}, n = 1k to 16k", slope(times[name]), "<=", SLOPE)
        check.require(
            f"growth exponent of brute force for {name}, n = 1k to 8k", slope(brute[name]), ">=", BRUTE_SLOPE
        )
        check.require(
            f"times as fast as brute force, {name}, n = 8k, construction included",
            brute[name][8000] / times[name][8000], ">=", SPEEDUP,
        )  # fmt: skip
    check.note(f"seconds: {times}; brute force: {brute}")

    check.require("relative error of masked linear attention", mask_error(), "<=", MASK_ERROR)
    layer = TopologicalAttention(32, (14, 14), 4)
    unmasked = sum(p.numel() for part in (layer.qkv, layer.proj) for p in part.parameters())
    added = sum(p.numel() for p in layer.parameters()) - unmasked
    check.require("parameters that the mask adds to a layer", added, "==", MASK_PARAMETERS)
    worst = max(gradient_error(name) for name in MAKERS)
    check.require("relative error of gradients of the parameters of f", worst, "<=", GRADIENT_ERROR)
