r"""Real spherical harmonics, and how they turn: the matrices that bring an edge onto the polar axis.

Conventions: orthonormal on the sphere, no Condon-Shortley phase, the polar axis is z, and of order m > 0 are the
cosines, of m < 0 the sines; degree l and order m stand at row :math:`l^2 + l + m`. So degree 1 is
:math:`\sqrt{3 / 4 \pi}\,(y, z, x)`.
"""

import functools
import math

import numpy as np
import torch
from torch import Tensor

__all__ = ["edge_frames", "rotate", "rotation_matrices", "sphere_points", "spherical_harmonics"]


def spherical_harmonics(directions: Tensor, degree: int) -> Tensor:
    r"""Return all real spherical harmonics up to a degree, as polynomials that are smooth at the poles as well.

    .. math:: Y_{l, \pm m} = \Pi_{lm}(z)\, \{\mathrm{Re}, \mathrm{Im}\}\,(x + i y)^m

    where :math:`\Pi_{lm}` follows from :math:`\Pi_{l-1,m}` and :math:`\Pi_{l-2,m}` by the recursion of normalised
    Legendre functions.

    Args:
        directions: unit vectors `(*, 3)`.
        degree: L, the highest.

    Returns:
        `(*, (L + 1)^2)`.
    """
    x, y, z = directions.unbind(-1)
    rows = [x] * (degree + 1) ** 2
    real, imaginary = torch.ones_like(x), torch.zeros_like(x)
    start = math.sqrt(1 / (4 * math.pi))
    for m in range(degree + 1):
        if m:
            real, imaginary = real * x - imaginary * y, real * y + imaginary * x
            # A factor of sqrt 2 tells cosines from the complex harmonics.
            start *= math.sqrt((2 * m + 1) / (2 * m)) * (math.sqrt(2) if m == 1 else 1)
        before, now = torch.zeros_like(z), torch.full_like(z, start)
        for degree_now in range(m, degree + 1):
            if degree_now > m:
                a = math.sqrt((4 * degree_now**2 - 1) / (degree_now**2 - m**2))
                last = degree_now - 1
                b = math.sqrt((last**2 - m**2) / (4 * last**2 - 1)) if last > m else 0.0
                before, now = now, a * (z * now - b * before)
            middle = degree_now**2 + degree_now
            rows[middle + m] = now * real
            if m:
                rows[middle - m] = now * imaginary
    return torch.stack(rows, -1)


def sphere_points(degree: int) -> tuple[np.ndarray, np.ndarray]:
    """Return points (P, 3) and weights (P,) that integrate spherical harmonics up to `degree` exactly, in float64.

    Args:
        degree: highest degree of the integrand; that of a product is the sum of its factors'.
    """
    heights, shares = np.polynomial.legendre.leggauss(degree // 2 + 1)
    angles = 2 * np.pi * np.arange(degree + 1) / (degree + 1)
    z, angle = (grid.ravel() for grid in np.meshgrid(heights, angles, indexing="ij"))
    radius = np.sqrt(1 - z**2)
    points = np.stack([radius * np.cos(angle), radius * np.sin(angle), z], -1)
    return points, np.repeat(shares, degree + 1) * 2 * np.pi / (degree + 1)


def rotation_matrices(rotation: Tensor, degree: int) -> list[Tensor]:
    r"""Return the matrices by which a rotation acts on every degree, by integration over the sphere.

    .. math:: D^l(R) = \int Y^l(R r)\, Y^l(r)^T dr, \qquad Y^l(R r) = D^l(R)\, Y^l(r)

    Exact, and slow; for many edges take `edge_frames`.

    Args:
        rotation: R, (3, 3).
        degree: the highest.

    Returns:
        (2 l + 1, 2 l + 1) for every degree l.
    """
    numbers = (torch.from_numpy(part).to(rotation) for part in sphere_points(2 * degree))
    points, weights = numbers
    turned, plain = (spherical_harmonics(p, degree) for p in (points @ rotation.T, points))
    whole = turned.T @ (weights[:, None] * plain)
    return [whole[at : at + size, at : at + size] for at, size in _blocks(degree)]


def _blocks(degree: int) -> list[tuple[int, int]]:
    """Return where the rows of every degree begin, and how many they are."""
    return [(n * n, 2 * n + 1) for n in range(degree + 1)]


@functools.cache
def _swaps(degree: int) -> list[list[list[float]]]:
    # z -> y, x -> z, y -> x: turns about z become turns about y.
    axes = torch.tensor([[0, 1, 0], [0, 0, 1], [1, 0, 0]], dtype=torch.float64)
    return [matrix.tolist() for matrix in rotation_matrices(axes, degree)]


@torch.compiler.assume_constant_result
def _swap(degree: int) -> list[list[float]]:
    """Return the matrix of one degree for the rotation that takes z to y, x to z and y to x."""
    return _swaps(max(degree, 8))[degree]


def edge_frames(directions: Tensor, degree: int) -> list[Tensor]:
    r"""Return for every edge the matrices :math:`D^l` of a rotation that takes the polar axis onto the edge.

    :math:`D^T x` are the coefficients in a frame whose polar axis is the edge. The rotation is
    :math:`R_z(\phi) R_y(\theta)`, and a turn about y is a turn about z between two constant matrices,
    :math:`D(R_y(\theta)) = J Z(\theta) J^T`. Near the poles, where :math:`\phi` is ill-defined, the edge is
    turned to the equator first; so frames have a gradient everywhere, and jump by a roll about the edge.

    Args:
        directions: vectors (E, 3) of any length but zero.
        degree: the highest.

    Returns:
        (E, 2 l + 1, 2 l + 1) for every degree l.
    """
    tiny = torch.finfo(directions.dtype).tiny ** 0.5
    n = directions / directions.norm(dim=-1, keepdim=True).clamp(min=tiny)
    polar = n[:, 2:].square() > 0.8
    x, y, z = torch.where(polar, n[:, [2, 0, 1]], n).unbind(-1)
    radius = (x.square() + y.square()).clamp(min=tiny).sqrt()
    about_z = _multiples(x / radius, y / radius, degree)
    about_y = _multiples(z, radius, degree)
    frames = []
    for n in range(degree + 1):
        swap = torch.tensor(_swap(n), dtype=directions.dtype, device=directions.device)
        turned = _turn(swap.T.expand(directions.shape[0], -1, -1), about_y, n)
        frame = _turn(swap @ turned, about_z, n)
        frames.append(torch.where(polar[:, :, None], swap @ frame, frame))
    return frames


def rotate(x: Tensor, frames: list[Tensor], *, back: bool = False) -> Tensor:
    """Return the coefficients (E, (L + 1)^2, C) in the frames of their edges, or from there `back` in the common one.

    Args:
        x: coefficients.
        frames: of `edge_frames`.
        back: which of the two.
    """
    matrices = frames if back else [d.mT for d in frames]
    parts = x.split([d.shape[2] for d in matrices], 1)
    return torch.cat([d @ part for d, part in zip(matrices, parts, strict=True)], 1)


def _multiples(cos: Tensor, sin: Tensor, degree: int) -> tuple[Tensor, Tensor]:
    """Return cos(m a) and sin(m a) for m from -degree to degree, (E, 2 degree + 1) each."""
    c, s = [torch.ones_like(cos)], [torch.zeros_like(sin)]
    for _ in range(degree):
        c, s = [*c, c[-1] * cos - s[-1] * sin], [*s, s[-1] * cos + c[-1] * sin]
    minus = [-one for one in reversed(s[1:])]
    return torch.stack([*reversed(c[1:]), *c], -1), torch.stack([*minus, *s], -1)


def _turn(rows: Tensor, angle: tuple[Tensor, Tensor], degree: int) -> Tensor:
    """Return a turn about the polar axis times the matrices (E, 2 degree + 1, *): it mixes orders m and -m alone."""
    middle = angle[0].shape[1] // 2
    cos, sin = (part[:, middle - degree : middle + degree + 1, None] for part in angle)
    return cos * rows - sin * rows.flip(1)
