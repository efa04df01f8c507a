"""The direct kernels against torch's own convolution in double precision."""

import ctypes
import random

import pytest
import torch
from torch.nn import functional as F

from omniconv.ops import _simd, depthwise_conv, explain
from omniconv.ops.depthwise_conv import _direct, _layout

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def draw_call(seed):
    """Return maps, a kernel and sizes drawn at random, all of which torch accepts."""
    draw = random.Random(seed)
    axes = draw.choice((1, 2, 2, 2, 3))
    channels, multiplier = draw.choice((1, 3, 8, 16, 19, 33)), draw.choice((1, 1, 1, 2))
    most = {1: 40, 2: 17, 3: 9}[axes]
    while True:
        size = [draw.randint(1, most) for _ in range(axes)]
        kernel = [draw.randint(1, 7) for _ in range(axes)]
        stride, padding, dilation = ([draw.randint(low, 3) for _ in range(axes)] for low in (1, 0, 1))
        # Padding beyond the kernel too: there the gradient is a convolution with less than no padding.
        padding = [p + draw.choice((0, 0, 5)) for p in padding]
        extents = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
        if all(s + 2 * p >= e for s, p, e in zip(size, padding, extents, strict=True)):
            break
    torch.manual_seed(seed)
    x = torch.randn(draw.randint(1, 3), channels, *size, dtype=torch.float64)
    w = torch.randn(channels * multiplier, 1, *kernel, dtype=torch.float64)
    if axes == 2 and draw.random() < 0.5:
        x = x.contiguous(memory_format=torch.channels_last)
    return x, w, {"stride": tuple(stride), "padding": tuple(padding), "dilation": tuple(dilation)}


def differentiate(function, x, w):
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = function(x, w)
    g = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    return [y.detach(), *torch.autograd.grad(y, (x, w), g)]


def check(x, w, how, tolerance=1e-12):
    wanted = differentiate(lambda x, w: CONV[x.ndim - 2](x, w, groups=x.shape[1], **how), x, w)
    got = differentiate(lambda x, w: depthwise_conv(x, w, **how, impl="direct"), x, w)
    for one, other in zip(got, wanted, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max() + 1))


@pytest.mark.parametrize("seed", range(60))
def test_any_call_equals_torchs_convolution(seed):
    check(*draw_call(seed))


@pytest.mark.parametrize("seed", range(12))
def test_maps_cut_into_tiles_give_the_same(seed, monkeypatch):
    monkeypatch.setattr(_direct, "_BUFFER_BYTES", 2000)
    monkeypatch.setattr(_layout, "_WORTH_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    x, w, how = draw_call(seed)
    layout = _direct._Layout(
        x, x.shape[2:], w.shape[2:], how["stride"], how["padding"], how["dilation"], [1] * 3
    )
    assert x[0, 0].numel() < 200 or max(layout.tiles) > 1
    check(x, w, how)


def test_float32_kernels_of_31_taps_a_side():
    x = torch.randn(2, 20, 28, 30).contiguous(memory_format=torch.channels_last)
    check(x, torch.randn(20, 1, 31, 31), {"padding": 15}, 2e-5)
    check(torch.randn(2, 20, 200), torch.randn(20, 1, 31), {"padding": 15}, 2e-5)


def one_call(kernel, table, threads, flags):
    """Stand for an OpenMP that gives one thread, however many are asked for."""
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(kernel)(table)


@pytest.mark.parametrize("entry", [None, one_call], ids=["Python threads", "fewer threads than asked for"])
def test_all_work_is_done_whatever_threads_there_are(entry, monkeypatch):
    monkeypatch.setattr(_simd, "_openmp", lambda: entry)
    monkeypatch.setattr(_layout, "_WORTH_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    x, w = torch.randn(3, 40, 12, 9, dtype=torch.float64), torch.randn(40, 1, 5, 3, dtype=torch.float64)
    check(x, w, {"padding": 2})


def test_kernels_that_do_not_fit_are_refused():
    with pytest.raises(
        ValueError,
        match=r"must fit into the padded map: got kernel \(5, 3\), dilation \(1, 1\), map \(4, 9\)",
    ):
        depthwise_conv(torch.ones(1, 2, 4, 9), torch.ones(2, 1, 5, 3), padding=(0, 1), impl="direct")


def test_says_what_it_needs(monkeypatch):
    x, w = torch.ones(1, 2, 5, 5), torch.ones(2, 1, 3, 3)
    monkeypatch.setattr(_direct, "_HAS_NUMBA", False)
    with pytest.raises(ValueError, match=r"numba is not installed \(pip install 'omniconv\[fast\]'\)"):
        depthwise_conv(x, w, impl="direct")
    assert depthwise_conv(x, w).shape == (1, 2, 3, 3)


def test_auto_takes_the_direct_kernels_where_they_were_measured_to_gain():
    def chosen(shape, kernel, grad=True, last=True, **kwargs):
        x, w = torch.empty(shape), torch.empty(shape[1], 1, *kernel, requires_grad=grad)
        x = x.contiguous(memory_format=torch.channels_last) if last and x.ndim == 4 else x
        return explain(depthwise_conv, x, w, padding=[k // 2 for k in kernel], **kwargs).chosen

    assert chosen((8, 96, 56, 56), (7, 7)) == "channels_last"
    assert chosen((8, 96, 56, 56), (7, 7), last=False) == "direct"
    assert chosen((8, 128, 4096), (31,)) == "direct"
    assert chosen((4, 512, 3199), (3,)) == "direct"
    assert chosen((1, 32, 64, 64, 64), (3, 3, 3)) == "direct"
    assert chosen((8, 960, 7, 7), (3, 3)) == "torch"
    assert chosen((8, 96, 56, 56), (7, 7), grad=False) == "torch"
    assert chosen((2, 8, 8, 8), (3, 3)) == "torch"  # too small to pay for the overhead
