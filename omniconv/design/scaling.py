r"""Rules that make a network larger: compound scaling, and width at fixed complexity.

Papers: EfficientNet, Tan and Le, https://arxiv.org/abs/1905.11946; ResNeXt, Xie et al.,
https://arxiv.org/abs/1611.05431.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from omniconv.layers.conv.inverted_residual import round_channels

__all__ = [
    "CompoundScale",
    "best_base",
    "cardinality_width",
    "compound_scaling",
    "round_channels",
    "scaling_bases",
]


@dataclass(frozen=True)
class CompoundScale:
    """How much deeper and wider a network becomes, and the image size that goes with it.

    Attributes:
        depth: multiplies the blocks of every stage.
        width: multiplies the channels.
        resolution: image side in pixels.
    """

    depth: float
    width: float
    resolution: int


def compound_scaling(
    phi: float,
    *,
    alpha: float = 1.2,
    beta: float = 1.1,
    gamma: float = 1.15,
    resolution: int = 224,
    multiple: int = 4,
) -> CompoundScale:
    r"""Scale depth, width and resolution together: `EfficientNet <https://arxiv.org/abs/1905.11946>`_, eq. 3.

    .. math:: d = \alpha^\phi, \quad w = \beta^\phi, \quad r = \gamma^\phi, \qquad
              \alpha \beta^2 \gamma^2 \approx 2

    Multiply-adds grow with :math:`(\alpha \beta^2 \gamma^2)^\phi`, about twofold a step.

    Args:
        phi: steps, 0 for the network as it is; fractions and negative values are allowed.
        alpha: base of the depth; all three defaults are the paper's.
        beta: base of the width.
        gamma: base of the resolution.
        resolution: image side at phi = 0, in pixels.
        multiple: the image side is rounded to a multiple of this (the paper's all are multiples of 4).

    Raises:
        ValueError: if a base is below 1, which would shrink what phi enlarges.
    """
    if min(alpha, beta, gamma) < 1:
        raise ValueError(f"alpha, beta and gamma must be at least 1: got {alpha}, {beta} and {gamma}")
    side = round(resolution * gamma**phi / multiple) * multiple
    return CompoundScale(alpha**phi, beta**phi, max(multiple, side))


def scaling_bases(
    *, step: float = 0.05, factor: float = 2.0, tolerance: float = 0.1
) -> Iterator[tuple[float, float, float]]:
    r"""Yield the grid of :math:`(\alpha, \beta, \gamma)` whose multiply-adds grow by about `factor` a step.

    Args:
        step: of the grid, which starts at 1.
        factor: wanted :math:`\alpha \beta^2 \gamma^2`.
        tolerance: largest relative distance from it.
    """
    count = math.floor((factor * (1 + tolerance) - 1) / step + 1e-9) + 1
    grid = [round(1 + step * index, 10) for index in range(count)]
    for alpha in grid:
        for beta in grid:
            for gamma in grid:
                if abs(alpha * beta**2 * gamma**2 / factor - 1) <= tolerance + 1e-12:
                    yield alpha, beta, gamma


def best_base(
    score: Callable[[CompoundScale], float],
    *,
    resolution: int = 224,
    multiple: int = 4,
    step: float = 0.05,
    factor: float = 2.0,
    tolerance: float = 0.1,
) -> tuple[float, float, float]:
    r"""Return the :math:`(\alpha, \beta, \gamma)` of the grid whose network at phi = 1 scores highest.

    This is the paper's first step; the second keeps the bases and raises phi.

    Args:
        score: of a scaled network, for example its validation accuracy after a short training.
        resolution: as in `compound_scaling`.
        multiple: as in `compound_scaling`.
        step: as in `scaling_bases`.
        factor: as in `scaling_bases`.
        tolerance: as in `scaling_bases`.

    Raises:
        ValueError: if no point of the grid meets the cost; take a smaller step or a larger tolerance.
    """
    bases = list(scaling_bases(step=step, factor=factor, tolerance=tolerance))
    if not bases:
        raise ValueError(
            f"no bases cost {factor} +- {tolerance:.0%} on a grid of {step}; take a smaller step"
        )

    def rated(base: tuple[float, float, float]) -> float:
        alpha, beta, gamma = base
        return score(
            compound_scaling(1, alpha=alpha, beta=beta, gamma=gamma, resolution=resolution, multiple=multiple)
        )

    return max(bases, key=rated)


def cardinality_width(
    cardinality: int, *, channels: int = 256, base_width: int = 64, kernel_size: int = 3
) -> int:
    r"""Return the width d of one path at which a block of C paths costs what a plain bottleneck does.

    .. math:: C\,(n d + k^2 d^2 + d n) \approx n b + k^2 b^2 + b n

    The rule of `ResNeXt <https://arxiv.org/abs/1611.05431>`_ (its table 2): the positive root, rounded.

    Args:
        cardinality: number of paths C.
        channels: n, channels of the block's input and output.
        base_width: b, inner width of the bottleneck that the block replaces.
        kernel_size: k.
    """
    budget = (2 * channels * base_width + kernel_size**2 * base_width**2) / cardinality
    a = kernel_size**2
    return max(1, round((math.sqrt(channels**2 + a * budget) - channels) / a))
