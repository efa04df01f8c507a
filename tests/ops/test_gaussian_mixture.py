"""Mixtures of Gaussians against sums over fine grids, scipy's densities and exact moments."""

import math

import numpy as np
import pytest
import torch
from scipy.signal import fftconvolve
from scipy.stats import multivariate_normal
from torch.autograd import gradcheck

from omniconv.ops.gaussian_mixture import (
    convolve,
    evaluate,
    exhaustive_em,
    fit_relu,
    from_images,
    integrate,
    pack,
    tree_hem,
    unpack,
)


def draw(shape, d, seed, box=2.0, signed=True):
    """Return a float64 mixture of `shape` (N, F, K) with deviations between 0.4 and 0.9."""
    random = torch.Generator().manual_seed(seed)
    weights = torch.randn(shape, generator=random, dtype=torch.float64)
    positions = box * (2 * torch.rand(*shape, d, generator=random, dtype=torch.float64) - 1)
    axes, _ = torch.linalg.qr(torch.randn(*shape, d, d, generator=random, dtype=torch.float64))
    deviations = 0.4 + 0.5 * torch.rand(*shape, d, generator=random, dtype=torch.float64)
    covariances = axes @ torch.diag_embed(deviations**2) @ axes.mT
    return pack(weights if signed else weights.abs(), positions, covariances)


def grid(d, reach, count):
    axis = torch.linspace(-reach, reach, count, dtype=torch.float64)
    return torch.stack(torch.meshgrid(*[axis] * d, indexing="ij"), -1).flatten(0, -2), float(
        axis[1] - axis[0]
    )


def moments(mixture):
    """Return integrals (N, F), means and covariances of whole mixtures with positive weights."""
    weights, positions, covariances = unpack(mixture)
    d = positions.shape[-1]
    mass = weights * ((2 * math.pi) ** d * torch.linalg.det(covariances)).sqrt()
    total = mass.sum(-1)
    mean = (mass[..., None] * positions).sum(2) / total[..., None]
    shift = positions - mean[:, :, None]
    second = covariances + shift[..., None] * shift[..., None, :]
    return total, mean, (mass[..., None, None] * second).sum(2) / total[..., None, None]


@pytest.mark.parametrize("d", [1, 2, 3, 4])
def test_values_and_integrals_are_those_of_scipys_densities(d):
    mixture = draw((2, 3, 4), d, 0)
    x = torch.randn(5, d, dtype=torch.float64)
    weights, positions, covariances = (t.numpy() for t in unpack(mixture))
    expected, total = np.zeros((2, 3, 5)), np.zeros((2, 3))
    for n, f, k in np.ndindex(2, 3, 4):
        volume = math.sqrt((2 * math.pi) ** d * np.linalg.det(covariances[n, f, k]))
        density = multivariate_normal(positions[n, f, k], covariances[n, f, k])
        expected[n, f] += weights[n, f, k] * volume * density.pdf(x.numpy())
        total[n, f] += weights[n, f, k] * volume
    np.testing.assert_allclose(evaluate(mixture, x), expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(integrate(mixture), total, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("d", [1, 2])
def test_convolution_is_the_sum_over_a_fine_grid(d):
    mixture, kernels = draw((2, 3, 4), d, 1), draw((2, 3, 2), d, 2, box=1.0)
    points, step = grid(d, 10, 161)
    shape = (161,) * d
    got = evaluate(convolve(mixture, kernels), points)
    data, windows = (evaluate(m, points).reshape(2, 3, *shape).numpy() for m in (mixture, kernels))
    for n, o in np.ndindex(2, 2):
        expected = sum(fftconvolve(data[n, f], windows[o, f], "same") for f in range(3)) * step**d
        np.testing.assert_allclose(got[n, o].reshape(shape), expected, atol=1e-6 * np.abs(expected).max())


def test_integrals_multiply_and_sizes_are_those_of_all_pairs():
    mixture, kernels = draw((2, 3, 5), 3, 3), draw((4, 3, 2), 3, 4)
    result = convolve(mixture, kernels)
    assert result.shape == (2, 4, 3 * 5 * 2, 13)
    torch.testing.assert_close(integrate(result), integrate(mixture) @ integrate(kernels).T)


def test_gradients():
    mixture, kernels = draw((1, 2, 3), 2, 5).requires_grad_(), draw((1, 2, 2), 2, 6).requires_grad_()
    assert gradcheck(convolve, (mixture, kernels), fast_mode=True)
    assert gradcheck(evaluate, (mixture, torch.randn(4, 2, dtype=torch.float64)), fast_mode=True)
    bias = torch.tensor([0.2, -0.1], dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda m, c: fit_relu(m, c), (mixture, bias), fast_mode=True)
    many = draw((1, 2, 11), 2, 7).requires_grad_()
    assert gradcheck(lambda m: tree_hem(m, 4), (many,), fast_mode=True)
    assert gradcheck(lambda m: exhaustive_em(m, 3, steps=2), (many,), fast_mode=True)


def test_the_relu_of_far_apart_gaussians_keeps_the_positive_ones():
    positions = 20 * torch.tensor([[0.0, 0], [1, 0], [0, 1]], dtype=torch.float64)
    mixture = pack(
        torch.tensor([[[2.0, -3, 0.5]]], dtype=torch.float64),
        positions[None, None],
        torch.eye(2, dtype=torch.float64).expand(1, 1, 3, 2, 2),
    )
    weights, kept, _ = unpack(fit_relu(mixture, steps=40))
    torch.testing.assert_close(weights[0, 0], torch.tensor([2.0, 0, 0.5]).double(), atol=0.05, rtol=0)
    assert torch.equal(kept[0, 0], positions)


def test_the_relu_fit_is_homogeneous_and_near():
    mixture = draw((20, 1, 12), 2, 8)
    points, _ = grid(2, 5, 51)
    wanted = evaluate(mixture, points).relu()
    fitted = fit_relu(mixture)
    weights, positions, covariances = unpack(mixture)
    clipped = pack(weights.relu(), positions, covariances)
    error, naive = (
        float(((evaluate(m, points) - wanted).norm(dim=-1) / wanted.norm(dim=-1)).mean())
        for m in (fitted, clipped)
    )
    assert error < naive / 2
    torch.testing.assert_close(
        fit_relu(pack(3 * weights, positions, covariances))[..., 0], 3 * fitted[..., 0]
    )


def test_a_bias_shifts_the_zero():
    mixture = draw((3, 2, 6), 2, 9)
    bias = torch.tensor([-100.0, 0.0]).double()
    weights = fit_relu(mixture, bias)[..., 0]
    assert (weights[:, 0] == 0).all()
    torch.testing.assert_close(weights[:, 1], fit_relu(mixture)[:, 1, :, 0])


@pytest.mark.parametrize("reduce", [tree_hem, exhaustive_em])
@pytest.mark.parametrize(("d", "count", "components"), [(2, 50, 8), (3, 21, 6), (2, 9, 1), (2, 16, 8)])
def test_reduction_keeps_integral_mean_and_covariance(reduce, d, count, components):
    mixture = draw((2, 3, count), d, 10, signed=False)
    reduced = reduce(mixture, components)
    assert reduced.shape == (2, 3, components, mixture.shape[-1])
    for got, expected in zip(moments(reduced), moments(mixture), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_clusters_that_are_as_many_as_components_are_found():
    centres = 30 * torch.tensor([[0.0, 0], [1, 0], [0, 1], [1, 1]], dtype=torch.float64)
    random = torch.Generator().manual_seed(0)
    positions = (centres[:, None] + torch.randn(4, 8, 2, generator=random, dtype=torch.float64)).flatten(0, 1)
    positions = positions[torch.randperm(32, generator=random)]
    eye = torch.eye(2, dtype=torch.float64).expand(1, 1, 32, 2, 2)
    mixture = pack(torch.ones(1, 1, 32, dtype=torch.float64), positions[None, None], eye)
    found = unpack(tree_hem(mixture, 4))[1][0, 0]
    assert (torch.cdist(found, centres).amin(0) < 2).all()


def test_empty_components_change_nothing():
    mixture = draw((2, 2, 35), 2, 11, signed=False)
    empty = draw((2, 2, 20), 2, 12)
    empty = torch.cat([torch.zeros_like(empty[..., :1]), empty[..., 1:]], -1)
    both = torch.cat([empty, mixture], 2)
    torch.testing.assert_close(tree_hem(both, 16), tree_hem(mixture, 16))
    nothing = tree_hem(empty, 4)
    assert torch.isfinite(nothing).all()
    assert (nothing[..., 0] == 0).all()


def test_few_components_stay_as_they_are():
    mixture = draw((1, 1, 5), 2, 13)
    assert tree_hem(mixture, 5) is mixture
    with pytest.raises(ValueError, match="components must be positive: got 0"):
        tree_hem(mixture, 0)


def test_an_image_becomes_a_mixture_near_it():
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(12.0), indexing="ij")
    image = torch.exp(-((rows - 9) ** 2 / 18 + (columns - 5) ** 2 / 8))
    mixture = from_images(image[None, None], 16)
    points = torch.stack([rows, columns], -1).reshape(-1, 2)
    error = (evaluate(mixture, points)[0, 0].reshape(16, 12) - image).norm() / image.norm()
    assert error < 0.3
    torch.testing.assert_close(integrate(mixture)[0, 0], image.sum())


def test_wrong_packings_are_refused():
    with pytest.raises(ValueError, match=r"a component needs 1 \+ d \+ d \* d numbers: got 8"):
        evaluate(torch.zeros(1, 1, 3, 8), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="must agree in F and M"):
        convolve(torch.zeros(1, 2, 3, 7), torch.zeros(1, 1, 3, 7))
