"""Deformable aggregation against loops in plain Python, and against the convolutions that it generalises."""

import math

import pytest
import torch
from torch.nn import functional as F

from omniconv.ops._numba import HAS_NUMBA
from omniconv.ops.deform.api import deform_aggregate, deform_conv2d
from omniconv.ops.dispatch import explain

needs_numba = pytest.mark.skipif(not HAS_NUMBA, reason="numba is not installed")
IMPLS = ("torch", pytest.param("compiled", marks=needs_numba))


def bilinear(image, y, x):
    """Return one sample of an image (H, W), zero outside."""
    height, width = image.shape
    total = 0.0
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < height and 0 <= column < width:
                total += (1 - abs(y - row)) * (1 - abs(x - column)) * float(image[row, column])
    return total


def loops(x, offset, weight, mask, stride, padding, dilation):
    """Return the deformable convolution of one image, number by number."""
    out, depth, kh, kw = weight.shape
    channels, groups = x.shape[1], offset.shape[1] // (2 * kh * kw)
    y = torch.zeros(1, out, *offset.shape[2:], dtype=x.dtype)
    for o in range(out):
        first = o // (out // (channels // depth)) * depth
        for i in range(y.shape[2]):
            for j in range(y.shape[3]):
                for d in range(depth):
                    g = (first + d) // (channels // groups)
                    for k in range(kh * kw):
                        v, u, at = k // kw, k % kw, g * kh * kw + k
                        row = i * stride - padding + v * dilation + float(offset[0, 2 * at, i, j])
                        column = j * stride - padding + u * dilation + float(offset[0, 2 * at + 1, i, j])
                        m = 1.0 if mask is None else float(mask[0, at, i, j])
                        y[0, o, i, j] += weight[o, d, v, u] * m * bilinear(x[0, first + d], row, column)
    return y


@pytest.mark.parametrize(
    ("channels", "out", "groups", "offset_groups", "masked", "stride", "padding", "dilation"),
    [(2, 3, 1, 1, False, 1, 1, 1), (4, 4, 2, 2, True, 2, 1, 1), (4, 4, 4, 1, True, 1, 2, 2)],
)
def test_convolution_is_that_of_loops_beyond_the_border_too(
    channels, out, groups, offset_groups, masked, stride, padding, dilation
):
    torch.manual_seed(0)
    x = torch.randn(1, channels, 6, 5, dtype=torch.float64)
    weight = torch.randn(out, channels // groups, 3, 3, dtype=torch.float64)
    size = [(s + 2 * padding - 2 * dilation - 1) // stride + 1 for s in x.shape[2:]]
    offset = 3 * torch.randn(1, 18 * offset_groups, *size, dtype=torch.float64)
    mask = torch.randn(1, 9 * offset_groups, *size, dtype=torch.float64) if masked else None
    found = deform_conv2d(x, offset, weight, None, mask, stride=stride, padding=padding, dilation=dilation)
    torch.testing.assert_close(found, loops(x, offset, weight, mask, stride, padding, dilation))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(3, 1, 1), ((2, 5), 2, 1), (3, 1, 3)])
def test_without_offsets_and_with_constant_masks_it_is_grouped_depthwise_convolution(
    impl, kernel, stride, dilation
):
    torch.manual_seed(0)
    x = torch.randn(2, 6, 11, 9)
    kh, kw = (kernel, kernel) if isinstance(kernel, int) else kernel
    taps = torch.randn(3, kh, kw)
    wanted = F.conv2d(
        x, taps.repeat_interleave(2, 0)[:, None], stride=stride, padding=2, dilation=dilation, groups=6
    )
    size = wanted.shape[2:]
    mask = taps.flatten()[None, :, None, None].expand(2, -1, *size)
    found = deform_aggregate(
        x, torch.zeros(2, 6 * kh * kw, *size), mask,
        kernel_size=kernel, stride=stride, padding=2, dilation=dilation, impl=impl,
    )  # fmt: skip
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_scale_stretches_kernel_and_offsets_about_the_centre(impl):
    torch.manual_seed(0)
    x, weight = torch.randn(1, 2, 9, 8), torch.randn(1, 9, 1, 1).expand(1, 9, 9, 8)
    found = deform_aggregate(x, torch.zeros(1, 18, 9, 8), weight, padding=1, offset_scale=2, impl=impl)
    kernel = weight[0, :, 0, 0].view(1, 1, 3, 3).expand(2, 1, 3, 3)
    torch.testing.assert_close(found, F.conv2d(x, kernel, padding=2, dilation=2, groups=2))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("wild", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30])
def test_positions_that_are_no_place_on_the_map_count_as_outside(impl, wild):
    x = torch.randn(1, 2, 4, 4, requires_grad=True)
    offset = torch.full((1, 18, 4, 4), wild, requires_grad=True)
    y = deform_aggregate(x, offset, padding=1, impl=impl)
    assert torch.equal(y, torch.zeros_like(y))
    y.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert torch.equal(offset.grad, torch.zeros_like(offset))


@pytest.mark.parametrize("impl", IMPLS)
def test_moving_the_map_and_the_offsets_moves_the_output(impl):
    torch.manual_seed(0)
    x, mask = torch.randn(1, 4, 12, 12), torch.randn(1, 18, 12, 12)
    x[..., :4, :] = x[..., -4:, :] = x[..., :4] = x[..., -4:] = 0
    offset = torch.rand(1, 36, 12, 12)
    shifts, axes = (2, -1), (2, 3)
    y = deform_aggregate(x, offset, mask, padding=1, impl=impl)
    moved = deform_aggregate(*(t.roll(shifts, axes) for t in (x, offset, mask)), padding=1, impl=impl)
    torch.testing.assert_close(moved, y.roll(shifts, axes))


@pytest.mark.parametrize("impl", IMPLS)
def test_an_empty_batch_gives_an_empty_batch(impl):
    x, offset = torch.empty(0, 4, 5, 5), torch.empty(0, 18, 5, 5, requires_grad=True)
    y = deform_aggregate(x, offset, padding=1, impl=impl)
    assert y.shape == (0, 4, 5, 5)
    y.sum().backward()
    assert offset.grad is not None


def test_kernels_that_do_not_fit_the_channels_are_refused():
    x, offset = torch.randn(1, 4, 5, 5), torch.zeros(1, 18, 5, 5)
    with pytest.raises(ValueError, match=r"weight must be .* for x's C = 4 channels in g groups: got"):
        deform_conv2d(x, offset, torch.randn(2, 3, 3, 3), padding=1)


@needs_numba
def test_the_compiled_loops_are_chosen_where_they_can():
    x, offset = torch.empty(2, 64, 28, 28), torch.empty(2, 72, 28, 28)
    assert explain(deform_aggregate, x, offset, padding=1).chosen == "compiled"
    assert explain(deform_aggregate, x.half(), offset, padding=1).chosen == "torch"
    assert explain(deform_aggregate, x.to("meta"), offset.to("meta"), padding=1).chosen == "torch"


def test_transforms_of_torch_func_go_through_plain_torch():
    x, offset = torch.randn(3, 1, 2, 5, 5), torch.randn(3, 1, 18, 5, 5)
    mapped = torch.func.vmap(lambda a, b: deform_aggregate(a, b, padding=1))(x, offset)
    torch.testing.assert_close(mapped[:, 0], deform_aggregate(x[:, 0], offset[:, 0], padding=1))
