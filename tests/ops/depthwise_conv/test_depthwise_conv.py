import pytest
import torch
from torch.nn import functional as F

import omniconv.ops
from omniconv.ops import depthwise_conv, explain
from omniconv.ops.depthwise_conv import _direct
from omniconv.ops.dispatch import table_of

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@pytest.mark.parametrize(
    ("shape", "kernel", "multiplier", "kwargs"),
    [
        ((2, 3, 11), (3,), 1, {"padding": 1}),
        ((2, 3, 11), (4,), 2, {"stride": 2}),
        ((2, 3, 9, 8), (5, 3), 1, {"padding": (2, 1)}),
        ((2, 3, 9, 8), (4, 2), 1, {"padding": "same", "dilation": (1, 3)}),
        ((2, 3, 9, 8), (5, 4), 3, {"padding": "valid", "dilation": 2}),
        ((1, 2, 5, 6, 7), (3, 2, 1), 1, {"padding": "same"}),
        ((1, 2, 5, 6, 7), (3, 3, 3), 1, {"padding": 1, "stride": (2, 1, 3)}),
    ],
)
@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
def test_equals_torchs_grouped_convolution(shape, kernel, multiplier, kwargs):
    out = shape[1] * multiplier
    x, w, b = torch.randn(shape), torch.randn(out, 1, *kernel), torch.randn(out)
    wanted = CONV[len(kernel)](x, w, b, groups=shape[1], **kwargs)
    torch.testing.assert_close(depthwise_conv(x, w, b, **kwargs), wanted, rtol=1e-4, atol=1e-5)


@pytest.fixture
def without_numba(monkeypatch):
    monkeypatch.setattr(_direct, "_HAS_NUMBA", False)
    table_of(depthwise_conv).kept.clear()
    yield
    table_of(depthwise_conv).kept.clear()


@pytest.mark.usefixtures("without_numba")
def test_auto_takes_the_composition_for_large_kernels_in_training_only_where_it_gains():
    def chosen(size, channels, pixels, batch=8, grad=True, last=False, **kwargs):
        x = torch.empty(batch, channels, pixels, pixels)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        w = torch.empty(channels, 1, size, size, requires_grad=grad)
        return explain(depthwise_conv, x, w, padding="same", **kwargs).chosen

    assert chosen(31, 192, 28) == "channels_last"
    assert chosen(31, 192, 28, last=True) == "channels_last"
    assert chosen(31, 192, 28, grad=False) == "channels_last"
    assert chosen(31, 192, 28, grad=False, last=True) == "torch"  # the same convolution
    assert chosen(7, 192, 28, grad=False) == "torch"
    assert chosen(3, 192, 28) == "torch"
    assert chosen(13, 8, 8, batch=1) == "torch"  # too small to pay for the overhead


@pytest.mark.usefixtures("without_numba")
def test_auto_leaves_alone_what_was_not_measured():
    x, w = torch.empty(8, 64, 56, 56), torch.empty(64, 1, 5, 51, requires_grad=True)
    assert explain(depthwise_conv, x, w, padding="same").chosen == "torch"
    x, w = x.double(), torch.empty(64, 1, 31, 31, dtype=torch.float64, requires_grad=True)
    assert explain(depthwise_conv, x, w, padding="same").chosen == "torch"


@pytest.mark.parametrize(
    ("x", "w", "kwargs", "reason"),
    [
        ((2, 3, 9), (3, 1, 3), {"padding": 1}, "it is for 2-d kernels, not 1-d"),
        ((2, 3, 9, 9), (3, 1, 4, 3), {"padding": "same"}, "it is for odd kernels, not 4 x 3"),
        ((2, 3, 9, 9), (6, 1, 3, 3), {"padding": 1}, "it is for one kernel a channel, not 2"),
        ((2, 3, 9, 9), (3, 1, 3, 3), {}, r"it is for padding that keeps the size, not \(0, 0\)"),
        (
            (2, 3, 9, 9),
            (3, 1, 3, 3),
            {"padding": 1, "stride": 2},
            r"it is for stride 1, not \(2, 2\)",
        ),
    ],
)
def test_channels_last_says_what_it_cannot_do(x, w, kwargs, reason):
    with pytest.raises(
        ValueError, match=f"impl 'channels_last' of depthwise_conv cannot take this call: {reason}"
    ):
        depthwise_conv(torch.ones(x), torch.ones(w), impl="channels_last", **kwargs)


def test_channels_last_refuses_low_precision_autocast_and_meta():
    x, w = torch.ones(1, 2, 5, 5), torch.ones(2, 1, 3, 3)

    def reason(x, w):
        return explain(depthwise_conv, x, w, padding=1).rows[1].reason

    assert reason(x, w) is None
    assert reason(x.bfloat16(), w.bfloat16()) == (
        "it is for float32 and float64, not torch.bfloat16 maps and torch.bfloat16 kernels"
    )
    assert reason(x.to("meta"), w.to("meta")) == "it is for CPUs, not meta"
    with torch.autocast("cpu", torch.bfloat16):
        assert reason(x, w) == reason(x.bfloat16(), w.bfloat16())
        assert depthwise_conv(x, w, padding=1).dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_torch_func_and_forward_mode_pass_through():
    x, w = torch.randn(2, 3, 20, 20), torch.randn(3, 1, 17, 17)

    def f(x, w):
        return depthwise_conv(x, w, padding="same").square().sum()

    x.requires_grad_()
    wanted = torch.autograd.grad(f(x, w), x)[0]
    x = x.detach()
    torch.testing.assert_close(torch.func.grad(f)(x, w), wanted, rtol=1e-4, atol=1e-3)
    batched = torch.func.vmap(lambda x: depthwise_conv(x[None], w, padding="same")[0])(x)
    torch.testing.assert_close(batched, depthwise_conv(x, w, padding="same"), rtol=1e-4, atol=1e-4)
    direction = torch.randn_like(x)
    _, slope = torch.func.jvp(lambda x: f(x, w), (x,), (direction,))
    torch.testing.assert_close(slope, (wanted * direction).sum(), rtol=1e-4, atol=1e-2)


def test_saves_no_copy_of_channels_last_maps():
    x = torch.randn(2, 4, 8, 8).contiguous(memory_format=torch.channels_last)
    w = torch.randn(4, 1, 15, 15, requires_grad=True)
    y = depthwise_conv(x, w, padding="same", impl="channels_last")
    saved = [t for t in y.grad_fn.saved_tensors if t.shape == x.shape]
    assert [t.data_ptr() for t in saved] == [x.data_ptr()]


def test_public_names():
    assert set(omniconv.ops.__all__) >= {"depthwise_conv", "explain"}
