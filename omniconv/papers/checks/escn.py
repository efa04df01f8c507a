"""In the frame of the edge, the tensor product of SO(3) is a small product for every order m: the same function with
other weights, still equivariant, for L^3 multiplications instead of L^6.

Multiplications are those for one edge with one input and one output channel, with what depends on the edge alone
(rotation matrices, harmonics of the filter) given: for the SO(2) form what torch's counter sees, for the tensor
product one for each Clebsch-Gordan coefficient, zeros included. They are polynomials in L, whose degrees are found
exactly, from differences at L = 0 to 8. The slopes at L = 2 to 8 are taken over the number of degrees,
L + 1, which is what features have of them; over L itself, terms of lower order weigh so much at these sizes that both
slopes come out lower, and are in the notes.
"""

import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from omniconv.core.seeds import generator
from omniconv.ops.so2_conv._torch import mix
from omniconv.ops.so2_conv.api import so2_conv
from omniconv.ops.so2_conv.reference import tensor_product
from omniconv.ops.so2_conv.weights import from_paths, to_paths, weight_count
from omniconv.ops.spherical_harmonics import edge_frames, rotate, rotation_matrices
from omniconv.papers.check import Check

BIJECTION_ERROR = 1e-5
DEGREES = (1, 2, 3, 4)
EQUIVARIANCE_ERROR = 1e-4
ROTATIONS = 20
EQUIVARIANT_DEGREE = 6
SLOPE = (2.7, 3.3)
REFERENCE_SLOPE = 5.0
COUNTED = range(9)
FITTED = range(2, 9)
ORDERS = (3, 6)


def draw(degree: int, order: int, channels: int, edges: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return features, unit vectors and weights, all float32, for outputs of about unit size."""
    random = generator(0, "escn", degree, order)
    x = torch.randn(edges, (degree + 1) ** 2, channels, generator=random)
    directions = torch.nn.functional.normalize(torch.randn(edges, 3, generator=random), dim=1)
    weight = torch.randn(weight_count(degree, order), channels, channels, generator=random)
    return x, directions, weight / math.sqrt(2 * channels * (degree + 1))


def bijection_error(degree: int) -> tuple[float, float]:
    """Return the relative differences of outputs for random path weights, and of these weights there and back."""
    x, directions, paths = draw(degree, degree, 8, 50)
    weight = from_paths(paths, degree)
    wanted = tensor_product(x, directions, paths, degree)
    output = float((so2_conv(x, directions, weight) - wanted).abs().max() / wanted.abs().max())
    return output, float((to_paths(weight, degree) - paths).abs().max() / paths.abs().max())


def rotations(count: int) -> list[Tensor]:
    """Return random rotations, (3, 3), float64."""
    found = []
    for seed in range(count):
        q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((3, 3)))
        q = q * np.sign(np.diag(r))
        found.append(torch.from_numpy(q * np.linalg.det(q)))
    return found


def equivariance_error(order: int) -> float:
    """Return the largest difference between turned outputs and outputs of turned inputs, float32."""
    x, directions, weight = draw(EQUIVARIANT_DEGREE, order, 8, 50)
    y = so2_conv(x, directions, weight, order=order)
    worst = 0.0
    for turn in rotations(ROTATIONS):
        matrix = torch.block_diag(*rotation_matrices(turn, EQUIVARIANT_DEGREE)).float()
        turned = so2_conv(matrix @ x, directions @ turn.float().T, weight, order=order)
        worst = max(worst, float((turned - matrix @ y).abs().max()))
    return worst


def roll_error(order: int) -> float:
    """Return the largest change of the output when the frames are rolled about their edges by random angles."""
    x, directions, weight = draw(EQUIVARIANT_DEGREE, order, 8, 50)
    y = so2_conv(x, directions, weight, order=order)
    frames = edge_frames(directions, EQUIVARIANT_DEGREE)
    worst = 0.0
    for angle in torch.rand(ROTATIONS, generator=generator(0, "rolls"), dtype=torch.float64) * 2 * math.pi:
        turn = torch.eye(3, dtype=torch.float64)
        turn[:2, :2] = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).reshape(2, 2)
        rolled = [
            (d @ roll.float())[:, :, max(0, n - order) : n + min(n, order) + 1]
            for n, (d, roll) in enumerate(
                zip(frames, rotation_matrices(turn, EQUIVARIANT_DEGREE), strict=True)
            )
        ]
        again = rotate(mix(rotate(x, rolled), weight, EQUIVARIANT_DEGREE, order), rolled, back=True)
        worst = max(worst, float((again - y).abs().max()))
    return worst


def multiplications(call: Callable[[], Tensor]) -> int:
    """Return how many multiplications a call makes in products of matrices."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() // 2


def count_so2(degree: int, order: int) -> int:
    """Return the multiplications of the SO(2) form for one edge and one channel."""
    x, directions, weight = draw(degree, order, 1, 1)
    frames = [
        d[:, :, max(0, n - order) : n + min(n, order) + 1]
        for n, d in enumerate(edge_frames(directions, degree))
    ]
    return multiplications(lambda: rotate(mix(rotate(x, frames), weight, degree, order), frames, back=True))


def count_product(degree: int) -> int:
    """Return the multiplications of the full tensor product for one edge and one channel: one a coefficient."""
    pairs = itertools.product(range(degree + 1), repeat=2)
    return sum(
        (2 * n + 1) * (2 * f + 1) * (2 * k + 1) for n, k in pairs for f in range(abs(n - k), n + k + 1)
    )


def polynomial_degree(counts: list[int]) -> int:
    """Return the degree of the polynomial through values at 0, 1, 2 ..., by how often differences are not all zero."""
    degree = -1
    while any(counts):
        degree, counts = degree + 1, [b - a for a, b in itertools.pairwise(counts)]
    return degree


def slope(counts: list[int], shift: int) -> float:
    """Return the slope of log count over log (L + shift), least squares."""
    logs = np.log([n + shift for n in FITTED])
    return float(np.polyfit(logs, np.log([counts[n] for n in FITTED]), 1)[0])


def run(check: Check) -> None:
    """Measure the bijection, the equivariance, the counts and the truncation."""
    errors = [bijection_error(degree) for degree in DEGREES]
    check.require(
        "relative difference from the full tensor product with random path weights, L = 1 to 4, float32",
        max(output for output, _ in errors), "<=", BIJECTION_ERROR,
    )  # fmt: skip
    check.require(
        "relative difference of path weights there and back",
        max(weights for _, weights in errors), "<=", BIJECTION_ERROR,
    )  # fmt: skip
    for order in (EQUIVARIANT_DEGREE, 1):
        name = f"L = {EQUIVARIANT_DEGREE}, M = {order}, float32"
        check.require(
            f"equivariance error over 20 rotations, {name}",
            equivariance_error(order),
            "<",
            EQUIVARIANCE_ERROR,
        )
        check.require(f"change by rolls about the edges, {name}", roll_error(order), "<", EQUIVARIANCE_ERROR)

    fast, slow = [count_so2(n, n) for n in COUNTED], [count_product(n) for n in COUNTED]
    for name, counts, order in (("SO(2) form", fast, ORDERS[0]), ("tensor product", slow, ORDERS[1])):
        degree = polynomial_degree(counts)
        check.require(f"degree in L of the {name}'s multiplications", degree, "==", order)
    check.require("slope of the SO(2) form's multiplications, L = 2 to 8", slope(fast, 1), ">=", SLOPE[0])
    check.require("the same", slope(fast, 1), "<=", SLOPE[1])
    check.require(
        "slope of the tensor product's multiplications, L = 2 to 8", slope(slow, 1), ">", REFERENCE_SLOPE
    )
    part = count_so2(EQUIVARIANT_DEGREE, 1) / fast[EQUIVARIANT_DEGREE]
    check.require("multiplications with M = 1 over those with all orders, L = 6", part, "<", 1)
    check.note(
        f"slopes over L itself: {slope(fast, 0):.2f} and {slope(slow, 0):.2f}; multiplications at L = 0 to 8: "
        f"SO(2) form {fast}, tensor product {slow}"
    )
