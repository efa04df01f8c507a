"""Layers on mixtures: what moves with their input, what they start with, what they keep."""

import torch

from omniconv.layers.conv.gaussian_mixture import (
    GaussianMixtureConv,
    GaussianMixtureNorm,
    GaussianMixtureReLU,
)
from omniconv.ops.gaussian_mixture import convolve, evaluate, integrate, pack, unpack


def draw(shape, d=2, seed=0):
    random = torch.Generator().manual_seed(seed)
    factors = torch.randn(*shape, d, d, generator=random, dtype=torch.float64)
    covariances = factors @ factors.mT + 0.2 * torch.eye(d)
    positions = 3 * torch.randn(*shape, d, generator=random, dtype=torch.float64)
    return pack(torch.randn(shape, generator=random, dtype=torch.float64), positions, covariances)


def shifted(mixture, by):
    weights, positions, covariances = unpack(mixture)
    return pack(weights, positions + by, covariances)


def test_the_layers_move_with_their_input():
    torch.manual_seed(0)
    layers = torch.nn.Sequential(
        GaussianMixtureConv(3, 2), GaussianMixtureReLU(2, 8), GaussianMixtureNorm(2)
    ).double()
    x, by = draw((2, 3, 6)), torch.tensor([5.0, -7.0], dtype=torch.float64)
    torch.testing.assert_close(layers(shifted(x, by)), shifted(layers(x), by), rtol=1e-6, atol=1e-6)


def test_kernels_are_gaussians_with_their_factors_covariances():
    layer = GaussianMixtureConv(2, 3, dim=3, kernel_components=4, radius=1.5).double()
    weights, positions, covariances = unpack(layer.kernels())
    assert weights.shape == (3, 2, 4)
    assert positions.abs().max() <= 1.5
    torch.testing.assert_close(covariances, (0.75**2 + 0.05) * torch.eye(3).double().expand(3, 2, 4, 3, 3))
    x = draw((2, 2, 5), d=3)
    torch.testing.assert_close(layer(x), convolve(x, layer.kernels()))


def test_outputs_start_about_as_large_as_inputs():
    torch.manual_seed(0)
    layer = GaussianMixtureConv(16, 16).double()
    masses = integrate(layer.kernels()).square().sum(1).mean().sqrt()
    assert 0.3 < masses < 3


def test_without_reduction_positions_stay():
    x = draw((1, 2, 5))
    y = GaussianMixtureReLU(2).double()(x)
    assert torch.equal(y[..., 1:], x[..., 1:])


def test_the_norm_does_not_depend_on_the_scale():
    x = draw((2, 3, 5))
    weights, positions, covariances = unpack(x)
    norm = GaussianMixtureNorm(3, gain=2.0).double()
    y = norm(pack(100 * weights, positions, covariances))
    size = integrate(pack(y[..., 0].abs(), positions, covariances)).mean(1)
    torch.testing.assert_close(size, torch.full((2,), 2.0).double(), rtol=1e-3, atol=0)
    torch.testing.assert_close(y[0, 0, 0, 0] / y[0, 0, 1, 0], x[0, 0, 0, 0] / x[0, 0, 1, 0])


def test_a_relu_leaves_little_below_zero():
    x = draw((1, 1, 10), seed=3)
    axis = torch.linspace(-6, 6, 25, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    before = evaluate(x, points)
    after = evaluate(GaussianMixtureReLU(1).double()(x), points).detach()
    assert before.min() < -0.1
    assert after.min() >= 0
    assert after.max() > 0.5 * before.max()
