"""Kolmogorov-Arnold convolutions against scalar functions in a loop, and bases against scipy and numpy."""

import math

import numpy as np
import pytest
import torch
from numpy.polynomial import Polynomial
from scipy import special
from scipy.interpolate import BSpline
from torch import nn
from torch.nn import functional as F

from omniconv.layers.conv.ka_bases import Bernstein, BSplines, Gaussians, Polynomials, Wavelets
from omniconv.layers.conv.kaconv import BottleneckKAConv2d, KAConv1d, KAConv2d, KAConv3d, train_degrees

X = torch.linspace(-2.5, 2.5, 101, dtype=torch.float64)
NOTHING = torch.empty(0)


def fibonacci_like(first, second, n, t):
    """Evaluate p_n of p_0 = first, p_1 = second, p_{n+1} = t p_n + p_{n-1} with numpy's polynomials."""
    p = [Polynomial(first), Polynomial(second)]
    for _ in range(n):
        p.append(Polynomial([0, 1]) * p[-1] + p[-2])
    return p[n](t)


TRUTHS = {
    "chebyshev": special.eval_chebyt,
    "fibonacci": lambda n, t: fibonacci_like([1], [0, 1], n, t),
    "hermite": special.eval_hermite,
    "jacobi": lambda n, t: special.eval_jacobi(n, 1, 1, t),
    "legendre": special.eval_legendre,
    "lucas": lambda n, t: fibonacci_like([2], [0, 1], n, t),
    # Of leading coefficient one.
    "gram": lambda n, t: special.eval_legendre(n, t) * 2**n * math.factorial(n) ** 2 / math.factorial(2 * n),
}


@pytest.mark.parametrize("family", TRUTHS)
def test_polynomials_are_those_of_scipy(family):
    basis = Polynomials(family, 6)
    learned = torch.tensor(basis.start, dtype=torch.float64)
    values = basis(X, learned)
    assert len(values) == basis.size == 7
    for n, value in enumerate(values):
        np.testing.assert_allclose(value.numpy(), TRUTHS[family](n, np.tanh(X.numpy())), rtol=1e-9, atol=1e-9)


def test_an_unknown_family_is_refused():
    with pytest.raises(ValueError, match=r"family must be one of .*: got 'zernike'"):
        Polynomials("zernike")  # pyright: ignore[reportArgumentType]


def test_bernstein_polynomials_are_binomial_probabilities():
    from scipy.stats import binom

    t = (1 + np.tanh(X.numpy())) / 2
    for i, value in enumerate(Bernstein(5)(X, NOTHING)):
        np.testing.assert_allclose(value.numpy(), binom.pmf(i, 5, t), atol=1e-12)


@pytest.mark.parametrize(("grid", "order"), [(5, 3), (4, 1), (3, 2)])
def test_splines_are_those_of_scipy_and_sum_to_one_inside(grid, order):
    basis = BSplines(grid, order)
    knots = -1 + 2 / grid * np.arange(-order, grid + order + 1)
    values = basis(X, NOTHING)
    assert len(values) == basis.size == grid + order
    for i, value in enumerate(values):
        piece = BSpline.basis_element(knots[i : i + order + 2], extrapolate=False)
        np.testing.assert_allclose(value.numpy(), np.nan_to_num(piece(X.numpy())), atol=1e-12)
    inside = X.abs() < 1
    torch.testing.assert_close(torch.stack(values).sum(0)[inside], torch.ones_like(X[inside]))


def test_wavelets_have_zero_mean_and_unit_norm():
    basis, x = Wavelets(3), torch.linspace(-20, 20, 20001, dtype=torch.float64)
    for value in basis(x, torch.tensor(basis.start, dtype=torch.float64)):
        assert abs(torch.trapezoid(value, x)) < 1e-9
        assert abs(torch.trapezoid(value**2, x) - 1) < 1e-9


def test_gaussians_are_one_at_their_centres():
    values = Gaussians(5)(torch.linspace(-2, 2, 5), NOTHING)
    torch.testing.assert_close(torch.stack(values).diagonal(), torch.ones(5))
    torch.testing.assert_close(values[1][0], torch.tensor(math.exp(-1)))


@pytest.mark.parametrize("act", [math.tanh, None])
def test_every_tap_is_a_function_of_its_pixel(act):
    torch.manual_seed(0)
    layer = KAConv2d(
        2, 3, 3, basis=Polynomials("hermite", 2), act=None if act is None else torch.tanh, padding=1
    )
    layer.double().requires_grad_(False)
    x = torch.randn(1, 2, 4, 3, dtype=torch.float64)
    hermite = (lambda t: 1.0, lambda t: 2 * t, lambda t: 4 * t * t - 2)
    expected = torch.zeros(1, 3, 4, 3, dtype=torch.float64)
    for o, c, u, v in np.ndindex(3, 2, 3, 3):

        def function(value, o=o, c=c, u=u, v=v):
            t = math.tanh(value)
            terms = [float(w[o, c, u, v]) * p(t) for w, p in zip(layer.weights, hermite, strict=True)]
            return sum(terms) + (
                float(layer.base[o, c, u, v]) * math.tanh(value) if layer.base is not None else 0.0
            )

        for i, j in np.ndindex(4, 3):
            if 0 <= i + u - 1 < 4 and 0 <= j + v - 1 < 3:
                expected[0, o, i, j] += function(float(x[0, c, i + u - 1, j + v - 1]))
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize(("kind", "axes"), [(KAConv1d, 1), (KAConv2d, 2), (KAConv3d, 3)])
def test_parameters(kind, axes):
    assert (
        sum(p.numel() for p in kind(4, 5, 3, basis=BSplines(), act=F.gelu).parameters()) == 3**axes * 20 * 9
    )
    assert (
        sum(p.numel() for p in kind(4, 5, 3, basis=Polynomials("lucas", 3)).parameters()) == 3**axes * 20 * 5
    )


def test_only_the_chosen_degrees_are_trained():
    torch.manual_seed(0)
    model = nn.Sequential(KAConv2d(1, 3, 3), nn.BatchNorm2d(3), BottleneckKAConv2d(3, 2, 3))
    train_degrees(model, [2])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.1, weight_decay=0.1)
    model(torch.randn(4, 1, 9, 9)).square().sum().backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    others = {"1.weight", "1.bias", "2.base.weight", "2.squeeze.weight", "2.expand.weight"}
    assert changed - others == {"0.weights.2", "2.functions.weights.2"}


def test_added_degrees_change_nothing_until_they_are_trained():
    torch.manual_seed(0)
    for family in ("gram", "chebyshev"):
        layer, x = KAConv2d(2, 3, 3, basis=Polynomials(family, 2)), torch.randn(2, 2, 6, 5)
        before = layer(x)
        layer.add_degrees(2)
        assert len(layer.weights) == layer.basis.size == 5
        torch.testing.assert_close(layer(x), before)
        train_degrees(layer, [3, 4])
        layer(x).sum().backward()
        assert layer.weights[4].grad is not None
    with pytest.raises(ValueError, match="only polynomials of a recurrence have further degrees"):
        KAConv2d(2, 3, 3, basis=Bernstein(2)).add_degrees()
