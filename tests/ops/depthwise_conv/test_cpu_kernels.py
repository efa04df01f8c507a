"""What holds of every implementation of our own on CPUs."""

import pytest
import torch
from torch.nn import functional as F

from omniconv.ops import depthwise_conv


@pytest.fixture(params=["direct", "fft"])
def impl(request):
    return request.param


def test_sums_are_the_same_bit_for_bit_every_time(impl, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    x, w = torch.randn(6, 24, 30, 30, requires_grad=True), torch.randn(24, 1, 13, 13, requires_grad=True)

    def run():
        y = depthwise_conv(x, w, padding=6, impl=impl)
        return y, *torch.autograd.grad(y.square().sum(), (x, w))

    first = run()
    for _ in range(5):
        for one, other in zip(first, run(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_float32_rounded_once(impl, dtype):
    x, w = torch.randn(2, 19, 9, 11).to(dtype), torch.randn(19, 1, 5, 5).to(dtype)
    x[0, 0, 0, 0], x[0, 1, 0, 0], x[0, 2, 3, 3] = float("inf"), float("nan"), torch.finfo(dtype).max
    for maps in (x, x.contiguous(memory_format=torch.channels_last)):
        got = depthwise_conv(maps, w, padding=2, impl=impl)
        exact = depthwise_conv(maps.float(), w.float(), padding=2, impl=impl)
        assert got.dtype == dtype
        torch.testing.assert_close(got, exact.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_gradients_that_are_no_plain_maps(impl):
    x = torch.randn(2, 5, 8, 8, dtype=torch.float64, requires_grad=True)
    w = torch.randn(5, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    # The gradient of a sum is one number, expanded: all its strides are zero.
    got = torch.autograd.grad(depthwise_conv(x, w, padding=1, impl=impl).sum(), (x, w))
    wanted = torch.autograd.grad(F.conv2d(x, w, padding=1, groups=5).sum(), (x, w))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_empty_batches_stay_empty(impl):
    x, w = torch.empty(0, 4, 6, 6, requires_grad=True), torch.randn(4, 1, 3, 3, requires_grad=True)
    y = depthwise_conv(x, w, padding=1, impl=impl)
    assert y.shape == (0, 4, 6, 6)
    of_x, of_w = torch.autograd.grad(y.sum(), (x, w))
    assert of_x.shape == x.shape
    assert torch.equal(of_w, torch.zeros_like(w))
