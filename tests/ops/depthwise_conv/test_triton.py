"""Triton's kernels, run by its interpreter, against the reference in double precision."""

import random
from types import SimpleNamespace

import pytest
import torch

from omniconv.core.cases import OpCase
from omniconv.ops import depthwise_conv, explain
from omniconv.ops.depthwise_conv import _triton, api
from omniconv.ops.depthwise_conv.cases import CASES
from omniconv.ops.dispatch import Table
from omniconv.testing.harness import run_check
from omniconv.testing.ops import (
    OP_CHECKS,
    equals_reference,
    fails_by_name,
    layouts,
    low_precision,
    op_name,
)

PREPARE, REFERENCE = api.TABLE.prepare, api.TABLE.reference


@pytest.fixture(scope="module", autouse=True)
def two_implementations(triton_interpreter):
    """Leave plain torch and these kernels in the table; the other ones have tests of their own."""
    rows = [row for row in api.TABLE.implementations if row.name in ("torch", "triton")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "TABLE", Table(api.TABLE.op, PREPARE, REFERENCE, tuple(rows)))
        yield


def case(id, x, kernel, multiplier=1, **kwargs):
    out = x[1] * multiplier
    return OpCase(depthwise_conv, {"x": x, "weight": (out, 1, *kernel), "bias": (out,)}, kwargs, id)


LONG = case("1d-long", (2, 1, 13), (9,), 2, padding=8, dilation=2)
TALL = case("2d-tall", (2, 1, 12, 5), (9, 2), padding=(4, 1), stride=(1, 2))
(MULTIPLIER,) = (case for case in CASES if case.id == "2d-multiplier")


@pytest.mark.parametrize("check", OP_CHECKS[:-1], ids=lambda check: check.__name__)
def test_keeps_the_contract(check):
    assert OP_CHECKS[-1] is fails_by_name  # which names implementations that are left out here
    run_check(check, "depthwise_conv", LONG)


@pytest.mark.parametrize("check", [layouts, low_precision], ids=lambda check: check.__name__)
def test_keeps_the_contract_tap_by_tap(check):
    run_check(check, "depthwise_conv", MULTIPLIER)


@pytest.mark.parametrize("subject", [*CASES, TALL], ids=op_name)
def test_equals_the_reference(subject):
    run_check(equals_reference, op_name(subject), subject)


def differentiate(function, *tensors):
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, g)]


def reference(x, w, b, **how):
    return REFERENCE(*PREPARE(x, w, b, **how))


def triton(x, w, b, **how):
    return depthwise_conv(x, w, b, **how, impl="triton")


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def check(shape, kernel, multiplier=1, dtype=torch.float32, last=False, **how):
    random = torch.Generator().manual_seed(3)
    shapes = shape, (shape[1] * multiplier, 1, *kernel), (shape[1] * multiplier,)
    x, w, b = (torch.randn(s, generator=random).to(dtype) for s in shapes)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    wanted = differentiate(lambda *t: reference(*t, **how), x.double(), w.double(), b.double())
    for one, other in zip(differentiate(lambda *t: triton(*t, **how), x, w, b), wanted, strict=True):
        assert one.dtype == dtype
        assert one.shape == other.shape
        atol = TOLERANCE[dtype] * float(other.abs().max() + 1)
        torch.testing.assert_close(one.double(), other, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("last", [False, True])
def test_types_and_formats(dtype, last):
    check((2, 3, 5, 6), (3, 5), dtype=dtype, last=last, padding=(1, 2))
    check((2, 3, 5, 6), (3, 11), dtype=dtype, last=last, padding=(1, 5))


@pytest.mark.parametrize("around", [-1, 0, 1])
def test_sizes_around_those_of_blocks(around):
    double = {"dtype": torch.float64}
    check((1, 1, _triton._SUMS + around), (1,), **double)  # pixels
    check((1, _triton._CHANNELS + around, 2, 3), (2, 2), last=True, **double)  # channels
    check((1, 1, 70), (_triton._TAPS + around,), **double)  # taps
    check((1, 1, 128 + around), (16,), **double)  # pixels, where sixteen taps are held too
    for columns in (16, 32, 64):
        check((1, 1, columns + around), (9,), padding=4)
    for rows in (16, 64):
        check((1, 1, rows + around, 3), (1, 9), padding=(0, 4))  # segments of a sample
        check((rows + around, 1, 2), (9,), padding=4)  # segments of all samples
    check((1, 1, 20), (17 + around,), padding=8)  # windows of 32 pixels
    check((1, 1, 40), (33 + around,), padding=16)  # taps of which a product of 64 by 32 sums up the diagonals


def test_kernels_that_are_larger_than_maps():
    check((2, 1, 7, 9), (31, 31), padding=15)


def test_kernels_of_hundreds_of_taps():
    check((2, 1, 150), (200,), padding=90)
    check((2, 1, 150), (30,), 2, padding=60, dilation=5)


@pytest.mark.parametrize("seed", range(10))
def test_any_call(seed):
    draw = random.Random(seed)
    axes = draw.choice((1, 2, 2, 3))
    most, longest = {1: (40, 13), 2: (10, 9), 3: (5, 9)}[axes]
    while True:
        size = [draw.randint(1, most) for _ in range(axes)]
        kernel = [draw.choice((1, 2, 3)) for _ in range(axes)]
        kernel[draw.randrange(axes)] = draw.choice((2, longest))
        stride, dilation = ([draw.choice((1, 1, 2, 3)) for _ in range(axes)] for _ in range(2))
        # Padding beyond the kernel too: there the gradient is a convolution with less than no padding.
        padding = [draw.randint(0, 3) + draw.choice((0, 0, 5)) for _ in range(axes)]
        extents = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
        if all(s + 2 * p >= e for s, p, e in zip(size, padding, extents, strict=True)):
            break
    how = {"stride": tuple(stride), "padding": tuple(padding), "dilation": tuple(dilation)}
    last = axes == 2 and draw.random() < 0.5
    check(
        (draw.randint(1, 3), draw.choice((1, 2, 5)), *size), kernel, draw.choice((1, 1, 2)), last=last, **how
    )


@pytest.mark.parametrize("kernel", [(3, 3), (2, 9)])
def test_programs_that_sum_more_than_one_block(kernel, monkeypatch):
    monkeypatch.setattr(_triton, "_PROGRAMS", 12)
    monkeypatch.setattr(_triton, "_WEIGHT_SUMS", 1024)
    check((5, 2, 19, 20), kernel, padding=(1, 1))


@pytest.mark.parametrize(
    ("kernel", "how"), [((9,), {"padding": 4}), ((3,), {"stride": 2, "dilation": 3, "padding": 3})]
)
def test_second_derivatives(kernel, how):
    def slopes(convolve, dtype):
        random = torch.Generator().manual_seed(5)
        x, w = (
            torch.randn(s, generator=random).to(dtype).requires_grad_() for s in ((2, 2, 20), (4, 1, *kernel))
        )
        y = convolve(x, w, None, **how)
        v = torch.randn(y.shape, generator=random).to(dtype).requires_grad_()
        first = torch.autograd.grad(y, (x, w), v, create_graph=True)
        return torch.autograd.grad(sum(f.square().sum() for f in first), (x, w, v))

    for one, other in zip(slopes(triton, torch.float32), slopes(reference, torch.float64), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-3)


def test_gradients_that_are_no_plain_maps():
    # The gradient of a sum is one number, expanded: all its strides are zero.
    def total(convolve, dtype):
        return differentiate(
            lambda x, w, b: convolve(x, w, b, padding=4).sum(), *(t.to(dtype) for t in tensors)
        )

    tensors = torch.randn(2, 3, 8, 8), torch.randn(3, 1, 3, 9), torch.randn(3)
    tensors = tensors[0].contiguous(memory_format=torch.channels_last), *tensors[1:]
    for one, other in zip(total(triton, torch.float32), total(reference, torch.float64), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-3)


def test_empty_batches_stay_empty():
    x, w, b = torch.empty(0, 4, 6, 6), torch.randn(4, 1, 3, 9), torch.randn(4)
    y, of_x, of_w, of_b = differentiate(lambda *t: triton(*t, padding=4), x, w, b)
    assert y.shape == (0, 4, 12, 6)
    assert of_x.shape == x.shape
    assert torch.equal(of_w, torch.zeros_like(w))
    assert torch.equal(of_b, torch.zeros_like(b))


def test_kernels_that_do_not_fit_are_refused():
    with pytest.raises(
        ValueError, match=r"must fit into the padded map: got kernel \(5, 3\), dilation \(1, 1\)"
    ):
        triton(torch.ones(1, 2, 4, 9), torch.ones(2, 1, 5, 3), None, padding=(0, 1))


def reason(x, w):
    return explain(depthwise_conv, x, w).rows[-1].reason


def test_says_what_it_cannot_do(monkeypatch):
    x, w = torch.ones(1, 2, 5, 5), torch.ones(2, 1, 3, 3)
    assert reason(x, w) is None
    assert reason(x, w.double()) == (
        "maps and kernels must be of one floating type, not torch.float32 and torch.float64"
    )
    huge = torch.ones(1).expand(2, 1, 1 << 30)
    assert (
        reason(huge, torch.ones(1, 1, 3))
        == "it is for fewer than 1073741824 pixels a channel, not 2147483648"
    )
    monkeypatch.delenv("TRITON_INTERPRET")
    assert reason(x, w) == "it is for CUDA, not cpu"


def test_auto_leaves_alone_what_was_not_measured():
    assert explain(depthwise_conv, torch.ones(1, 2, 5, 5), torch.ones(2, 1, 3, 3)).chosen == "torch"


@pytest.mark.parametrize(("allowed", "precision"), [(False, "ieee"), (True, "tf32")])
def test_tensor_cores_round_to_tf32_where_torch_may(allowed, precision, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_tf32=allowed))
    assert _triton._Layout(torch.ones(1, 1, 9), [9], [9], [1], [4], [1], [1]).precision == precision
