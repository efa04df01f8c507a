"""Sliding windows against loops, torch's pooling, and semigroups in which order matters."""

import functools
import math

import pytest
import torch
from torch.nn import functional as F

from omniconv.ops.sliding_window import sliding_window


@pytest.mark.parametrize("size", range(1, 34))
@pytest.mark.parametrize("dilation", [1, 3])
def test_pooling_is_that_of_torch(size, dilation):
    x = torch.randn(2, 3, 131, dtype=torch.float64)
    most = F.max_pool1d(x, size, 1, dilation=dilation)
    torch.testing.assert_close(
        sliding_window(x, size, torch.maximum, dilation=dilation), most, rtol=0, atol=0
    )
    kernel = torch.ones(3, 1, size, dtype=torch.float64)
    torch.testing.assert_close(
        sliding_window(x, size, dilation=dilation), F.conv1d(x, kernel, dilation=dilation, groups=3)
    )


def test_two_axes_pool_images():
    x = torch.randn(2, 3, 13, 11, dtype=torch.float64)
    sums = sliding_window(sliding_window(x, 5, dim=-1), 4, dim=-2)
    torch.testing.assert_close(sums / 20, F.avg_pool2d(x, (4, 5), 1))


@pytest.mark.parametrize("size", [1, 2, 5, 6, 7, 11])
def test_order_is_kept_where_it_matters(size):
    # Matrices: a semigroup that does not commute.
    x = torch.randn(19, 2, 2, dtype=torch.float64)
    expected = [
        functools.reduce(torch.matmul, [x[i + 2 * k] for k in range(size)]) for i in range(19 - 2 * size + 2)
    ]
    found = sliding_window(x, size, torch.matmul, dim=0, dilation=2) if 19 > 2 * (size - 1) else None
    if found is None:
        assert not expected
    else:
        torch.testing.assert_close(found, torch.stack(expected))


def test_steps_grow_with_the_logarithm_of_the_window():
    for size in range(1, 200):
        calls = []

        def combine(a, b, calls=calls):
            calls.append(a.numel())
            return a + b

        sliding_window(torch.zeros(400), size, combine)
        assert len(calls) == math.floor(math.log2(size)) + size.bit_count() - 1


def test_gradients_reach_every_entry():
    x = torch.randn(2, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: sliding_window(x, 5), x)


@pytest.mark.parametrize("size", [0, 8])
def test_windows_must_fit(size):
    with pytest.raises(ValueError, match=f"size must be at least 1 and fit into x: got {size}"):
        sliding_window(torch.zeros(2, 7), size)
