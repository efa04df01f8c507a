"""Every lowering against SciPy's correlation and against torch over many sizes."""

import numpy as np
import pytest
import torch
from scipy.signal import correlate2d
from torch.nn import functional as F

from omniconv.ops.conv.api import conv
from omniconv.ops.dispatch import explain

LOWERINGS = ["im2col", "im2win", "sliding"]


@pytest.mark.parametrize("impl", ["torch", *LOWERINGS])
def test_is_the_sum_of_scipys_correlations(impl):
    x, weight = torch.randn(2, 3, 9, 8, dtype=torch.float64), torch.randn(4, 3, 3, 5, dtype=torch.float64)
    found = conv(x, weight, impl=impl)
    for n in range(2):
        for o in range(4):
            planes = [correlate2d(x[n, c], weight[o, c], mode="valid") for c in range(3)]
            np.testing.assert_allclose(found[n, o], np.sum(planes, 0), atol=1e-12)


@pytest.mark.parametrize("impl", LOWERINGS)
@pytest.mark.parametrize("kernel", [1, 2, 3, 7, 8, 9, 15, 16, 21])
@pytest.mark.parametrize("channels", [1, 3, 17])
def test_all_widths_of_kernels_and_vectors(impl, kernel, channels):
    pytest.importorskip("numba")
    x, weight = torch.randn(1, 2, 23, 101), torch.randn(channels, 2, 2, kernel)
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    found = conv(x, weight, padding=1, impl=impl)
    assert (found - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize("impl", ["im2win", "sliding"])
def test_numbers_that_are_not_finite_stay_in_their_windows(impl):
    pytest.importorskip("numba")
    x, weight = torch.randn(1, 1, 8, 70), torch.randn(2, 1, 3, 3)
    x[0, 0, 4, 30] = torch.nan
    assert torch.equal(conv(x, weight, impl=impl).isnan(), F.conv2d(x, weight).isnan())


def test_auto_slides_where_torch_is_slow():
    pytest.importorskip("numba")
    x = torch.zeros(1, 1, 512, 512)
    assert explain(conv, x, torch.zeros(1, 1, 31, 31), padding=15).chosen == "sliding"
    assert explain(conv, torch.zeros(1, 64, 56, 56), torch.zeros(64, 64, 3, 3)).chosen == "torch"
    assert explain(conv, x, torch.zeros(1, 1, 31, 31), padding=15, stride=2).chosen == "torch"
