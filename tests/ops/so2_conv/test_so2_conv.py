"""SO(2) convolution against the full tensor product, and against turned inputs."""

import numpy as np
import pytest
import torch

from omniconv.ops.so2_conv._torch import mix
from omniconv.ops.so2_conv.api import so2_conv
from omniconv.ops.so2_conv.reference import tensor_product
from omniconv.ops.so2_conv.weights import from_paths, pad_orders, to_paths, weight_count
from omniconv.ops.spherical_harmonics import edge_frames, rotate, rotation_matrices

POLES = torch.tensor([[0.0, 0.0, 2.0], [0.0, 0.0, -1.0], [0.0, 1e-12, 1.0]], dtype=torch.float64)


def draw(degree, order=None, edges=6):
    torch.manual_seed(degree)
    count = weight_count(degree, degree if order is None else order)
    x = torch.randn(edges, (degree + 1) ** 2, 3, dtype=torch.float64)
    directions = torch.randn(edges, 3, dtype=torch.float64)
    directions[: len(POLES)] = POLES
    return x, directions, torch.randn(count, 2, 3, dtype=torch.float64)


@pytest.mark.parametrize("degree", range(5))
def test_path_weights_have_equals_among_weights_of_orders(degree):
    x, directions, paths = draw(degree)
    unit = torch.nn.functional.normalize(directions, dim=1)
    weight = from_paths(paths, degree)
    torch.testing.assert_close(so2_conv(x, directions, weight), tensor_product(x, unit, paths, degree))
    torch.testing.assert_close(to_paths(weight, degree), paths)


@pytest.mark.parametrize(("degree", "order"), [(4, None), (4, 1), (3, 0), (8, 2)])
def test_turned_inputs_give_turned_outputs(degree, order):
    x, directions, weight = draw(degree, order)
    y = so2_conv(x, directions, weight, order=order)
    for seed in range(3):
        q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((3, 3)))
        turn = torch.from_numpy(q * np.linalg.det(q))
        matrix = torch.block_diag(*rotation_matrices(turn, degree))
        turned = so2_conv(matrix @ x, directions @ turn.T, weight, order=order)
        torch.testing.assert_close(turned, matrix @ y, atol=1e-10, rtol=1e-10)


def test_a_roll_about_the_edge_changes_nothing():
    x, directions, weight = draw(3)
    angle = torch.tensor(0.7, dtype=torch.float64)
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    roll = torch.stack([angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero, zero, zero, one])
    rolls = rotation_matrices(roll.reshape(3, 3), 3)
    frames = [d @ turn for d, turn in zip(edge_frames(directions, 3), rolls, strict=True)]
    rolled = rotate(mix(rotate(x, frames), weight, 3, 3), frames, back=True)
    torch.testing.assert_close(rolled, so2_conv(x, directions, weight))


def test_dropped_orders_are_zero_weights():
    x, directions, weight = draw(4, 2)
    torch.testing.assert_close(
        so2_conv(x, directions, weight, order=2), so2_conv(x, directions, pad_orders(weight, 4, 2))
    )


def test_gradients_of_directions_are_right_at_the_poles_too():
    x, directions, weight = draw(2)
    directions.requires_grad_()
    torch.autograd.gradcheck(lambda d: so2_conv(x, d, weight), directions)
