"""Hyena N-D against a direct convolution, what every direction sees, and the rank of its kernels."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from omniconv.layers.sequence.hyena_nd import HyenaNd

DOUBLE = {"dtype": torch.float64}


def direct(x, kernel):
    """The causal convolution of maps (N, C, H, W) by torch's own, padded in front."""
    h, w = kernel.shape[1:]
    return F.conv2d(F.pad(x, (w - 1, 0, h - 1, 0)), kernel.flip(1, 2)[:, None], groups=x.shape[1])


def test_an_order_of_three_is_the_recurrence_of_the_paper():
    layer = HyenaNd(3, order=3, directions="causal", **DOUBLE)
    x = torch.randn(2, 3, 6, 5, **DOUBLE)
    z = F.pad(layer.project(x), (2, 0, 2, 0))
    x0, x1, x2, v = F.conv2d(z, layer.short.weight, layer.short.bias, groups=12).chunk(4, 1)
    for gate, kernel, skip in zip((x1, x2), layer.filter((6, 5)).chunk(2), layer.skip, strict=True):
        v = gate * v
        v = direct(v, kernel) + skip[:, None, None] * v
    torch.testing.assert_close(layer(x), layer.mix(x0 * v))


@pytest.mark.parametrize(
    ("directions", "order", "axes"),
    [("causal", 2, 2), ("causal", 3, 1), ("alternate", 3, 2), ("all", 2, 2), ("all", 2, 3)],
)
def test_what_a_pixel_sees(directions, order, axes):
    layer = HyenaNd(2, axes, order=order, directions=directions, **DOUBLE)
    sizes = (5, 4, 3)[:axes]
    x = torch.randn(1, 2, *sizes, requires_grad=True, **DOUBLE)
    for place in itertools.product(*(range(size) for size in sizes)):
        (gradient,) = torch.autograd.grad(layer(x)[(0, slice(None), *place)].sum(), x)
        seen = gradient[0].abs().amax(0) > 1e-12
        before = torch.ones(sizes, dtype=torch.bool)
        if directions == "causal":
            before[:] = False
            before[tuple(slice(p + 1) for p in place)] = True
        assert torch.equal(seen, before)


@pytest.mark.parametrize("product", [True, False])
def test_products_have_rank_one(product):
    layer = HyenaNd(4, product=product, **DOUBLE)
    ranks = torch.linalg.matrix_rank(layer.filter((8, 7)), rtol=1e-9)
    assert bool((ranks == 1).all()) == product
    assert bool((ranks > 1).all()) != product


def test_windows_leave_a_hundredth_where_the_paper_says():
    rates = HyenaNd(5, directions="causal", **DOUBLE).filter.rates
    torch.testing.assert_close(torch.exp(-rates[:, 0] * 1.5), torch.full((2,), 0.01, **DOUBLE))
    torch.testing.assert_close(torch.exp(-rates[:, -1] * 0.3), torch.full((2,), 0.01, **DOUBLE))


def test_rates_learn_only_where_they_should():
    assert HyenaNd(4, learned_decay=True).filter.rates.requires_grad
    assert not HyenaNd(4).filter.rates.requires_grad
