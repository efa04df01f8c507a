"""The Poincare ball against its hyperboloid, whose geometry is linear algebra."""

import pytest
import torch

from omniconv.ops import poincare
from omniconv.ops.poincare import (
    distance,
    expmap,
    expmap0,
    gyration,
    logmap,
    logmap0,
    midpoint,
    mobius_add,
    scale_radially,
    transport,
)

C = 0.7


def points(count, dim=3, spread=0.6, seed=0):
    random = torch.Generator().manual_seed(seed)
    return expmap0(spread * torch.randn(count, dim, dtype=torch.float64, generator=random), C)


def lift(x):
    """Points of the ball as points of the hyperboloid <p, p> = -1 / C."""
    square = C * x.square().sum(-1, keepdim=True)
    return torch.cat(((1 + square) / C**0.5, 2 * x), -1) / (1 - square)


def product(p, q):
    return (p[..., 1:] * q[..., 1:]).sum(-1) - p[..., 0] * q[..., 0]


def lower(p):
    return p[..., 1:] / (1 + C**0.5 * p[..., :1])


def test_distances_are_those_of_the_hyperboloid():
    x, y = points(8), points(8, seed=1)
    expected = (-C * product(lift(x), lift(y))).clamp(min=1).acosh() / C**0.5
    torch.testing.assert_close(distance(x, y, C), expected)


def test_maps_are_inverse_to_each_other_and_go_as_far_as_tangents_are_long():
    x, v = points(8), 0.5 * torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(logmap0(expmap0(v, C), C), v)
    torch.testing.assert_close(logmap(x, expmap(x, v, C), C), v)
    conformal = 2 / (1 - C * x.square().sum(-1))
    torch.testing.assert_close(distance(x, expmap(x, v, C), C), conformal * v.norm(dim=-1))


def test_the_sum_is_a_translation_of_the_hyperboloid():
    x, y = points(8), points(8, seed=1)
    torch.testing.assert_close(mobius_add(-x, mobius_add(x, y, C), C), y)
    z = points(8, seed=2)
    moved = distance(mobius_add(x, y, C), mobius_add(x, z, C), C)
    torch.testing.assert_close(moved, distance(y, z, C))
    # A boost along x in hyperboloid coordinates.
    p, q = lift(x), lift(y)
    time, space = C**0.5 * p[:, :1], C**0.5 * p[:, 1:]
    along = (space * q[:, 1:]).sum(-1, keepdim=True)
    boosted = torch.cat((time * q[:, :1] + along, q[:, 1:] + space * (q[:, :1] + along / (1 + time))), 1)
    torch.testing.assert_close(mobius_add(x, y, C), lower(boosted))


def test_gyrations_make_up_for_what_sums_do_not_commute():
    a, b, v = points(8), points(8, seed=1), points(8, seed=2)
    expected = mobius_add(-mobius_add(a, b, C), mobius_add(a, mobius_add(b, v, C), C), C)
    torch.testing.assert_close(gyration(a, b, v, C), expected)
    moved = transport(a, b, v, C)
    lengths = [(2 / (1 - C * p.square().sum(-1))) * t.norm(dim=-1) for p, t in ((a, v), (b, moved))]
    torch.testing.assert_close(*lengths)


def test_the_midpoint_is_the_mean_on_the_hyperboloid():
    x = points(9, spread=1.0)
    mean = lift(x).mean(0, keepdim=True)
    mean = mean / (-C * product(mean, mean)[:, None]).sqrt()
    torch.testing.assert_close(midpoint(x, C, 0), lower(mean))
    pair = points(2)
    center = midpoint(pair, C, 0)
    torch.testing.assert_close(*distance(pair, center, C))


@pytest.mark.parametrize("name", ["tanh", "atanh", "asinh"])
@pytest.mark.parametrize("scale", [1e-3, 0.3])
def test_radial_maps_and_their_slopes(name, scale):
    x = scale * torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x.requires_grad_()
    s = C**0.5 * x.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(scale_radially(x, name, C), getattr(s, name)() / s * x)
    assert torch.autograd.gradcheck(lambda x: scale_radially(x, name, C), x, rtol=1e-6)
    zero = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(scale_radially(zero, name, C).sum(), zero)
    torch.testing.assert_close(gradient, torch.ones_like(zero))


def test_slopes_of_sums_that_broadcast_along_any_axis():
    x = points(6).mT[None].clone().requires_grad_()
    y = points(2, seed=1).mT[..., None].transpose(0, 1).clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: mobius_add(x, y, C, 1), (x, y))
    assert torch.autograd.gradgradcheck(lambda x, y: mobius_add(x, y, C, 1), (x, y), fast_mode=True)


def test_nothing_leaves_the_ball():
    v = 1e4 * torch.randn(20, 3)
    y = expmap0(v, C)
    assert (C**0.5 * y.norm(dim=-1) <= poincare.rim(torch.float32) + 1e-6).all()
    assert logmap0(y, C).isfinite().all()
    assert distance(y, -y, C).isfinite().all()
