"""Hyperbolic layers against the slow form: patches unfolded, mapped to the ball, hyperplanes one by one."""

import pytest
import torch
from scipy.special import beta
from torch.nn import functional as F

from omniconv.layers.geometry.poincare import (
    PoincareBatchNorm2d,
    PoincareConv2d,
    PoincareLinear,
    poincare_sum,
)
from omniconv.ops.poincare import distance, expmap, expmap0, logmap, logmap0, midpoint, mobius_add, transport

C = 0.4


def fully_connected(x, z, r):
    """The paper's layer on a point x of the ball: signed distances, then the point that has them."""
    conformal = 2 / (1 - C * x.square().sum())
    w = []
    for normal, offset in zip(z, r, strict=True):
        size = normal.norm()
        inside = conformal * C**0.5 * (x @ normal) / size * (2 * C**0.5 * offset).cosh()
        inside = inside - (conformal - 1) * (2 * C**0.5 * offset).sinh()
        w.append((2 * size * inside.asinh()).sinh() / C**0.5)
    w = torch.stack(w)
    return w / (1 + (1 + C * w.square().sum()).sqrt())


def random_state(layer):
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


def test_the_linear_layer_is_the_papers_equation():
    torch.manual_seed(0)
    layer = random_state(PoincareLinear(5, 4, C).double())
    x = torch.randn(6, 5, dtype=torch.float64)
    expected = torch.stack([fully_connected(p, layer.weight, layer.bias) for p in expmap0(x, C)])
    torch.testing.assert_close(layer(x), logmap0(expected, C))


@pytest.mark.parametrize("stride", [1, 2])
def test_the_convolution_is_the_linear_layer_on_joined_patches(stride):
    torch.manual_seed(0)
    layer = random_state(PoincareConv2d(3, 4, stride=stride, c=C).double())
    x = 0.5 * torch.randn(2, 3, 5, 7, dtype=torch.float64)
    patches = F.unfold(x, 3, padding=1, stride=stride) * beta(27 / 2, 0.5) / beta(3 / 2, 0.5)
    points = expmap0(patches, C, 1).mT.flatten(0, 1)
    y = torch.stack([fully_connected(p, layer.weight.flatten(1), layer.bias) for p in points])
    expected = logmap0(y, C).unflatten(0, (2, -1)).mT.unflatten(2, (5, 7) if stride == 1 else (3, 4))
    torch.testing.assert_close(layer(x), expected)


def test_it_starts_as_the_identity_and_becomes_euclidean_without_curvature():
    x = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(PoincareLinear(6, 6, C).double()(x), x)
    torch.manual_seed(0)
    layer = random_state(PoincareConv2d(3, 4, c=1e-8).double())
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    bias = -2 * layer.weight.flatten(1).norm(dim=1) * layer.bias
    torch.testing.assert_close(
        layer(x), F.conv2d(layer.gain * x, 2 * layer.weight, bias, padding=1), atol=1e-6, rtol=0
    )


def test_batch_norm_is_logarithm_transport_and_exponential():
    torch.manual_seed(0)
    layer = random_state(PoincareBatchNorm2d(3, C).double())
    layer.var.data.fill_(0.8)
    x = 0.7 * torch.randn(2, 3, 4, 5, dtype=torch.float64)
    points = expmap0(x.permute(0, 2, 3, 1).reshape(-1, 3), C)
    mean, target = midpoint(points, C, 0), expmap0(layer.mean, C)[None]
    var = distance(points, mean, C).square().mean()
    tangents = transport(mean, target, logmap(mean, points, C), C)
    y = logmap0(expmap(target, (0.8 / (var + 1e-6)).sqrt() * tangents, C), C)
    torch.testing.assert_close(layer(x), y.view(2, 4, 5, 3).permute(0, 3, 1, 2))
    torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * var)
    layer.momentum = 1.0
    trained = layer(x)
    torch.testing.assert_close(layer.eval()(x), trained)


def test_sums_are_mobius_sums():
    x, y = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64).unbind()
    flat = [expmap0(t.movedim(1, -1), C) for t in (x, y)]
    torch.testing.assert_close(poincare_sum(x, y, C), logmap0(mobius_add(*flat, C), C).movedim(-1, 1))
