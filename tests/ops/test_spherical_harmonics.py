"""Spherical harmonics against scipy, rotations against what they must do."""

import math

import numpy as np
import pytest
import torch

from omniconv.ops.spherical_harmonics import (
    edge_frames,
    rotate,
    rotation_matrices,
    sphere_points,
    spherical_harmonics,
)

DEGREE = 8
POLAR = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0], [1e-9, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])


def random_rotation(seed):
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((3, 3)))
    q = q * np.sign(np.diag(r))
    return torch.from_numpy(q * np.linalg.det(q))


def rows(degree):
    return slice(degree**2, (degree + 1) ** 2)


def test_harmonics_are_scipys_without_the_condon_shortley_phase():
    special = pytest.importorskip("scipy.special")
    n = torch.nn.functional.normalize(torch.randn(9, 3, dtype=torch.float64), dim=1)
    polar, azimuth = n[:, 2].arccos().numpy(), torch.atan2(n[:, 1], n[:, 0]).numpy()
    y = spherical_harmonics(n, DEGREE)
    for degree in range(DEGREE + 1):
        for m in range(degree + 1):
            if hasattr(special, "sph_harm_y"):
                value = (-1) ** m * special.sph_harm_y(degree, m, polar, azimuth)
            else:
                value = (-1) ** m * special.sph_harm(m, degree, azimuth, polar)
            scale = math.sqrt(2) if m else 1
            np.testing.assert_allclose(y[:, degree**2 + degree + m], scale * value.real, atol=1e-13)
            if m:
                np.testing.assert_allclose(y[:, degree**2 + degree - m], scale * value.imag, atol=1e-13)


def test_points_integrate_products_exactly():
    points, weights = (torch.from_numpy(part) for part in sphere_points(2 * DEGREE))
    y = spherical_harmonics(points, DEGREE)
    torch.testing.assert_close(y.T @ (weights[:, None] * y), torch.eye(y.shape[1], dtype=y.dtype))


def test_rotations_compose_and_turn_harmonics():
    first, second = random_rotation(0), random_rotation(1)
    n = torch.nn.functional.normalize(torch.randn(5, 3, dtype=torch.float64), dim=1)
    y, turned = (spherical_harmonics(p, DEGREE) for p in (n, n @ first.T))
    matrices = [rotation_matrices(r, DEGREE) for r in (first, second, first @ second)]
    for degree, (a, b, ab) in enumerate(zip(*matrices, strict=True)):
        torch.testing.assert_close(a @ b, ab, atol=1e-12, rtol=0)
        torch.testing.assert_close(y[:, rows(degree)] @ a.T, turned[:, rows(degree)], atol=1e-12, rtol=0)
    order = [1, 2, 0]
    torch.testing.assert_close(matrices[0][1], first[order][:, order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_frames_are_rotations_that_take_the_polar_axis_onto_the_edge(dtype):
    directions = torch.cat([POLAR, 3 * torch.randn(20, 3)]).to(dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    z = spherical_harmonics(POLAR[:1].to(dtype), DEGREE)[0]
    y = spherical_harmonics(torch.nn.functional.normalize(directions, dim=1), DEGREE)
    frames = edge_frames(directions, DEGREE)
    for degree, d in enumerate(frames):
        torch.testing.assert_close(d @ z[rows(degree)], y[:, rows(degree)], atol=tolerance, rtol=0)
    # Degree 1 is the rotation itself; the others must be what that rotation does to them.
    for edge in range(0, len(directions), 6):
        turn = frames[1][edge].double()[[2, 0, 1]][:, [2, 0, 1]]
        assert float(torch.linalg.det(turn)) == pytest.approx(1, abs=1e-4)
        for d, wanted in zip(frames, rotation_matrices(turn, DEGREE), strict=True):
            torch.testing.assert_close(d[edge].double(), wanted, atol=10 * tolerance, rtol=0)


def test_there_and_back_again():
    x = torch.randn(6, (DEGREE + 1) ** 2, 2, dtype=torch.float64)
    frames = edge_frames(torch.randn(6, 3, dtype=torch.float64), DEGREE)
    torch.testing.assert_close(rotate(rotate(x, frames), frames, back=True), x)
