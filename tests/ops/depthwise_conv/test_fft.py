"""Depthwise convolution in the frequencies of rows against torch's own convolution in double precision."""

import random

import pytest
import torch
from torch.nn import functional as F

from omniconv.ops import depthwise_conv, explain
from omniconv.ops.depthwise_conv import _fft, _layout

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def draw_call(seed):
    """Return maps, a kernel, a bias and padding drawn at random, all of which torch accepts."""
    draw = random.Random(seed)
    axes = draw.choice((1, 2, 2, 2, 3))
    channels, multiplier = draw.choice((1, 3, 8, 16, 19, 33)), draw.choice((1, 1, 1, 2))
    most = {1: 60, 2: 20, 3: 9}[axes]
    while True:
        size, kernel = ([draw.randint(1, high) for _ in range(axes)] for high in (most, 9))
        # Padding beyond the kernel too: there the gradient is a convolution with less than no padding.
        padding = [draw.randint(0, 3) + draw.choice((0, 0, 5, 12)) for _ in range(axes)]
        if all(s + 2 * p >= k for s, p, k in zip(size, padding, kernel, strict=True)):
            break
    torch.manual_seed(seed)
    x = torch.randn(draw.randint(1, 3), channels, *size, dtype=torch.float64)
    w = torch.randn(channels * multiplier, 1, *kernel, dtype=torch.float64)
    if axes == 2 and draw.random() < 0.5:
        x = x.contiguous(memory_format=torch.channels_last)
    return x, w, torch.randn(len(w), dtype=torch.float64), tuple(padding)


def differentiate(function, *inputs):
    inputs = [t.detach().requires_grad_() for t in inputs]
    y = function(*inputs)
    g = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, inputs, g)]


def check(x, w, b, padding, tolerance=1e-12):
    wanted = differentiate(lambda *t: CONV[x.ndim - 2](*t, padding=padding, groups=x.shape[1]), x, w, b)
    got = differentiate(lambda *t: depthwise_conv(*t, padding=padding, impl="fft"), x, w, b)
    for one, other in zip(got, wanted, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * float(other.abs().max() + 1))


@pytest.mark.parametrize("seed", range(60))
def test_any_call_equals_torchs_convolution(seed):
    check(*draw_call(seed))


@pytest.mark.parametrize("seed", range(20))
def test_maps_cut_into_tiles_give_the_same(seed, monkeypatch):
    monkeypatch.setattr(_fft, "_CACHE_BYTES", 20_000)
    monkeypatch.setattr(_fft, "_LONGEST", 20)
    monkeypatch.setattr(_layout, "_WORTH_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    x, w, b, padding = draw_call(seed)
    size = [s + 2 * p - k + 1 for s, p, k in zip(x.shape[2:], padding, w.shape[2:], strict=True)]
    layout = _fft._Layout(x, size, w.shape[2:], padding)
    assert layout.length <= 20
    assert x[0, 0].numel() < 150 or max(layout.tiles) > 1
    check(x, w, b, padding)


@pytest.mark.parametrize(
    ("shape", "kernel"),
    [
        ((2, 20, 28, 30), (31, 31)),
        ((2, 20, 14, 14), (31, 31)),
        ((1, 20, 40, 200), (5, 51)),
        ((1, 20, 200, 40), (51, 5)),
        ((1, 3, 12, 20, 16), (7, 7, 7)),
    ],
)
def test_float32_is_as_exact_as_sums_of_rows(shape, kernel):
    x, w, padding = torch.randn(shape), torch.randn(shape[1], 1, *kernel), [k // 2 for k in kernel]

    def convolve(x, w):
        return depthwise_conv(x, w, padding=padding, impl="fft")

    def plain(x, w):
        return CONV[x.ndim - 2](x, w, padding=padding, groups=x.shape[1])

    exact = differentiate(plain, x.double(), w.double())
    for form in [torch.contiguous_format] + [torch.channels_last] * (len(shape) == 4):
        got = differentiate(convolve, x.contiguous(memory_format=form), w)
        assert got[0].is_contiguous(memory_format=form)
        for one, other in zip(got, exact, strict=True):
            assert (one - other).abs().max() < 5e-6 * other.square().mean().sqrt()


def test_gradients_of_gradients():
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64, requires_grad=True)
    w, b = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 1, 3, 5), (3,)))

    def convolve(*inputs):
        return depthwise_conv(*inputs, padding=(1, 2), impl="fft")

    torch.autograd.gradcheck(convolve, (x, w, b))
    torch.autograd.gradgradcheck(convolve, (x, w, b))


def test_taps_that_meet_nothing_have_no_gradient():
    x, w = torch.randn(1, 2, 4, 5), torch.randn(2, 1, 11, 13, requires_grad=True)
    depthwise_conv(x, w, padding=(5, 6), impl="fft").square().sum().backward()
    met = torch.zeros(11, 13, dtype=torch.bool)
    met[5 - 3 : 5 + 4, 6 - 4 : 6 + 5] = True
    assert (w.grad[:, 0, ~met] == 0).all()
    assert (w.grad[:, 0, met] != 0).all()


def test_what_is_not_finite_stays_in_its_rows():
    x, w = torch.randn(2, 3, 9, 8), torch.randn(3, 1, 3, 5)
    y = depthwise_conv(x, w, padding=(1, 2), impl="fft")
    x[1, 2, 4, 4] = float("inf")
    spoilt = ~depthwise_conv(x, w, padding=(1, 2), impl="fft").isfinite()
    expected = torch.zeros_like(spoilt)
    expected[1, 2, 3:6] = True
    assert torch.equal(spoilt, expected)
    assert y.isfinite().all()


@pytest.mark.parametrize(
    ("kernel", "more", "reason"),
    [
        ((3, 3), {"stride": 2}, r"stride and dilation 1, not \(2, 2\) and \(1, 1\)"),
        ((3, 3), {"dilation": (1, 2)}, r"stride and dilation 1, not \(1, 1\) and \(1, 2\)"),
        ((3, 99), {}, "at most 96 taps along an axis, not 99"),
    ],
)
def test_says_what_it_is_for(kernel, more, reason):
    with pytest.raises(ValueError, match=reason):
        depthwise_conv(torch.ones(1, 2, 99, 99), torch.ones(2, 1, *kernel), impl="fft", **more)


def test_auto_takes_it_for_long_kernels():
    def chosen(shape, kernel, grad=True, **kwargs):
        x, w = torch.empty(shape), torch.empty(shape[1], 1, *kernel, requires_grad=grad)
        return explain(depthwise_conv, x, w, padding=[k // 2 for k in kernel], **kwargs).chosen

    assert chosen((4, 128, 56, 56), (31, 31)) == "fft"
    assert chosen((8, 160, 28, 28), (13, 13)) == "fft"
    assert chosen((8, 160, 28, 28), (13, 13), grad=False) == "fft"
    assert chosen((1, 32, 32, 32, 32), (7, 7, 7)) == "fft"
    assert chosen((8, 96, 56, 56), (7, 7)) == "direct"
    assert chosen((8, 768, 7, 7), (7, 7)) == "direct"
    assert chosen((8, 640, 7, 7), (13, 13)) == "direct"  # of 169 taps no more than 49 meet the map
    assert chosen((8, 96, 56, 56), (31, 31), dilation=2) == "direct"
