"""Four corner convolutions side by side see all around, keep volumes, mask next to nothing, have an inverse in 2n - 1
steps that is far faster than elimination, and do no worse than Glow's 1x1 convolutions alone.

Training sees scikit-learn's 8x8 digits.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from omniconv.layers.conv.finc import FInCUnit
from omniconv.layers.conv.inverse import CORNERS, CornerConv2d
from omniconv.ops.inverse_conv._torch import free
from omniconv.ops.inverse_conv.reference import corner_matrix
from omniconv.papers.check import Check
from omniconv.papers.checks.inverse_flow import median_seconds, sequential_steps
from omniconv.papers.small_flow import Mix1x1, bits_per_dim, digit_counts, train_flow

ROUND_TRIP = 1e-5
LOG_DET = 1e-8
ERROR = 1e-5
SPEED = 20.0
BITS_MARGIN = 0.02
STEPS = 400
SEEDS = (0, 1, 2)


def random_unit(channels: int, dtype: torch.dtype = torch.float32) -> FInCUnit:
    """Return a unit with weights of a trained one's size."""
    unit = FInCUnit(channels, dtype=dtype)
    with torch.no_grad():
        for weight in unit.parameters():
            weight.normal_(std=0.5 / (3 * math.sqrt(channels // 4)))
    return unit


@torch.no_grad()
def round_trip_error() -> float:
    """Return the largest difference after the unit and its inverse, and the other way round."""
    unit, x = random_unit(16), torch.randn(4, 16, 16, 13)
    return max(float((unit.inverse(unit(x)) - x).abs().max()), float((unit(unit.inverse(x)) - x).abs().max()))


def log_det() -> float:
    """Return the logarithm of the determinant of the unit's whole Jacobian."""
    unit, x = random_unit(8, torch.float64), torch.randn(1, 8, 5, 6, dtype=torch.float64)
    jacobian: Any = torch.autograd.functional.jacobian(unit, x)
    return abs(float(torch.linalg.slogdet(jacobian.reshape(x.numel(), x.numel()))[1]))


@torch.no_grad()
def flipped_difference() -> float:
    """Return the largest difference between a corner's convolution and the flipped one at the top left.

    Weights and maps are whole numbers, so that sums are exact in whatever order.
    """
    plain = CornerConv2d(3)
    plain.weight.copy_(torch.randint(-5, 6, plain.weight.shape))
    x = torch.randint(-5, 6, (2, 3, 7, 5)).float()
    worst = 0.0
    for corner, axes in CORNERS.items():
        other = CornerConv2d(3, corner=corner)
        other.load_state_dict(plain.state_dict())
        worst = max(worst, float((other(x) - plain(x.flip(axes)).flip(axes)).abs().max()))
    return worst


@torch.no_grad()
def quadrants(layer: torch.nn.Module, channels: int, size: int = 9) -> int:
    """Return how many of the four quadrants about an impulse its response reaches."""
    x = torch.zeros(1, channels, size, size)
    x[:, :, size // 2, size // 2] = 1
    response = layer(x).abs().amax((0, 1)) > 0
    halves = slice(0, size // 2), slice(size // 2 + 1, size)
    return sum(bool(response[rows, columns].any()) for rows in halves for columns in halves)


@torch.no_grad()
def compiled_inverse() -> tuple[float, float, float]:
    """Return the error of the unit's inverse at 32x32x12, and the times of dense solvers over its own.

    The matrices of the four quarters are there beforehand. They are solved by elimination, which does not know that
    they are triangular, and by substitution, which does.
    """
    unit = random_unit(12)
    y = torch.randn(1, 12, 32, 32)
    systems = []
    for part, (corner, axes) in zip(
        y.chunk(4, 1), zip(unit.corners, CORNERS.values(), strict=True), strict=True
    ):
        right = part.flip(axes).permute(0, 2, 3, 1).reshape(-1, 1)
        systems.append((corner_matrix(corner.weight.detach(), 32, 32), right, axes))  # type: ignore[arg-type]

    def dense(solve: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        parts = [
            solve(matrix, right).reshape(1, 32, 32, 3).permute(0, 3, 1, 2).flip(axes)
            for matrix, right, axes in systems
        ]
        return torch.cat(parts, 1)

    def substitution(matrix: Tensor, right: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(matrix, right, upper=False)

    error = float((unit.inverse(y) - dense(torch.linalg.solve)).abs().max())
    own = median_seconds(lambda: unit.inverse(y), 15)
    return (
        error,
        median_seconds(lambda: dense(torch.linalg.solve), 3) / own,
        median_seconds(lambda: dense(substitution), 5) / own,
    )


def run(check: Check) -> None:
    """Measure the unit, its inverse, what it masks, and small flows."""
    torch.manual_seed(0)
    check.require("difference after unit and inverse, float32", round_trip_error(), "<", ROUND_TRIP)
    check.require("log-determinant of the unit's Jacobian", log_det(), "<=", LOG_DET)
    check.require("difference of the corners from flips of one", flipped_difference(), "==", 0)
    check.require("quadrants that the unit's response reaches", quadrants(random_unit(8), 8), "==", 4)
    check.require("quadrants that one corner's reaches", quadrants(CornerConv2d(2), 2), "==", 1)
    for size in (4, 8, 16):
        check.require(
            f"sequential steps of the inverse at n = {size}", sequential_steps(size)[0], "==", 2 * size - 1
        )

    error, elimination, substitution = compiled_inverse()
    check.require("difference from the dense solution at 32x32x12", error, "<=", ERROR)
    check.require("times as fast as dense elimination there", elimination, ">=", SPEED, unit="times")
    check.note(f"{substitution:.1f} times as fast as dense substitution with the same matrices")

    right = 0
    for channels in (1, 3, 12):
        for size in (2, 3, 5):
            masked = int((free(CornerConv2d(channels, size).weight.detach()) == 0).sum())
            right += masked == channels * (channels + 1) // 2
    check.require("kernels, of 9, that mask C (C + 1) / 2 weights", right, "==", 9)
    channels, size = 12, 3
    masked = 4 * int((free(CornerConv2d(channels // 4, size).weight.detach()) == 0).sum())
    # Two masked convolutions, each with half of its taps and half of the middle one.
    emerging = 2 * ((size**2 - 1) // 2 * channels**2 + channels * (channels - 1) // 2)
    check.require("weights masked in a unit of 12 channels", masked, "<", emerging, baseline=emerging)

    train, test = digit_counts()
    mixings: dict[str, Callable[[int], list]] = {
        "finc": lambda c: [Mix1x1(c), FInCUnit(c)],
        "1x1": lambda c: [Mix1x1(c)],
    }
    bits = {
        name: [bits_per_dim(train_flow(mixing, train, seed, STEPS), test) for seed in SEEDS]
        for name, mixing in mixings.items()
    }
    means = {name: sum(values) / len(values) for name, values in bits.items()}
    check.require(
        "bits per dimension of digits over Glow's, mean of 3 seeds",
        means["finc"] - means["1x1"], "<=", BITS_MARGIN, baseline=means["1x1"], unit="bits",
    )  # fmt: skip
    check.note(f"bits with FInC units {bits['finc']}, without {bits['1x1']}")
