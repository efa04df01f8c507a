"""Layers on spherical-harmonic features: turned inputs give turned outputs."""

import numpy as np
import pytest
import torch
from torch import nn

from omniconv.layers.geometry.so2_conv import SO2Conv, SphereActivation
from omniconv.ops.spherical_harmonics import rotation_matrices, spherical_harmonics


def random_turn(degree, seed=0):
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((3, 3)))
    turn = torch.from_numpy(q * np.linalg.det(q))
    return turn, torch.block_diag(*rotation_matrices(turn, degree))


@pytest.mark.parametrize("order", [None, 1])
def test_scaled_convolution_is_equivariant(order):
    torch.manual_seed(0)
    layer = SO2Conv(3, 4, 3, order=order, edge_channels=5, dtype=torch.float64)
    x, vectors, edges = (torch.randn(shape, dtype=torch.float64) for shape in ((7, 16, 3), (7, 3), (7, 5)))
    turn, matrix = random_turn(3)
    wanted = matrix @ layer(x, vectors, edges)
    torch.testing.assert_close(layer(matrix @ x, vectors @ turn.T, edges), wanted)
    assert not torch.allclose(layer(x, vectors, edges), layer(x, vectors, 0 * edges))


def test_outputs_are_about_as_large_as_inputs():
    torch.manual_seed(0)
    layer = SO2Conv(64, 64, 4)
    y = layer(torch.randn(50, 25, 64), torch.randn(50, 3))
    assert 0.5 < float(y.detach().std()) < 1.5


def test_the_identity_on_the_sphere_is_the_identity():
    layer = SphereActivation(4, nn.Identity).double()
    x = torch.randn(3, 25, 2, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x, atol=1e-6, rtol=1e-5)


def test_the_square_on_the_sphere_is_the_square_of_the_function():
    class Square(nn.Module):
        def forward(self, x):
            return x.square()

    x = torch.zeros(1, 25, 1)
    x[:, :9] = torch.randn(1, 9, 1)
    y = SphereActivation(4, Square)(x)
    n = torch.nn.functional.normalize(torch.randn(20, 3), dim=1)
    basis = spherical_harmonics(n, 4)
    torch.testing.assert_close(basis @ y[0], (basis @ x[0]).square(), atol=1e-5, rtol=1e-4)


def test_activation_is_equivariant_as_far_as_it_is_resolved():
    x = torch.randn(3, 9, 2, dtype=torch.float64)
    _, matrix = random_turn(2)
    errors = []
    for resolution in (4, 30):
        layer = SphereActivation(2, resolution=resolution).double()
        errors.append(float((layer(matrix @ x) - matrix @ layer(x)).abs().max()))
    assert errors[1] < 1e-4 < errors[0]
