"""The forms of deformable convolution for hardware against ordinary and dilated convolutions."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from omniconv.layers.conv.deform_hardware import HardwareDeformConv2d
from omniconv.ops.deform.api import deform_conv2d
from omniconv.ops.deform.offsets import round_offset, square_offset


@pytest.mark.parametrize(("depthwise", "square", "rounded"), list(itertools.product((False, True), repeat=3)))
def test_a_new_layer_is_an_ordinary_convolution(depthwise, square, rounded):
    torch.manual_seed(0)
    layer = HardwareDeformConv2d(
        4, 6, depthwise=depthwise, square=square, rounded=rounded, bound=2.0, stride=2
    )
    x = torch.randn(2, 4, 9, 8)
    groups = 6 if depthwise else 1
    wanted = F.conv2d(layer.pointwise(x), layer.weight, layer.bias, stride=2, padding=1, groups=groups)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("stretch", "kernel"), [(0, 3), (1, 3), (3, 3), (2, 5)])
def test_a_stretched_square_is_a_dilated_kernel(stretch, kernel):
    torch.manual_seed(0)
    x, weight = torch.randn(1, 3, 12, 10), torch.randn(4, 3, kernel, kernel)
    offset = square_offset(torch.full((1, 1, 12, 10), float(stretch)), kernel)
    padding = kernel // 2
    wanted = F.conv2d(x, weight, padding=(1 + stretch) * padding, dilation=1 + stretch)
    found = deform_conv2d(x, offset, weight, padding=padding)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("square", "kernel"), [(False, 3), (True, 3), (True, 5)])
def test_offsets_stay_within_the_bound_and_reach_it(square, kernel):
    torch.manual_seed(0)
    layer = HardwareDeformConv2d(2, 2, kernel, square=square, bound=3.0)
    torch.nn.init.normal_(layer.conv_offset.weight, std=10)
    largest = layer.find_offset(torch.randn(1, 2, 9, 9)).abs().max()
    torch.testing.assert_close(largest, torch.tensor(3.0))


@pytest.mark.parametrize("square", [False, True])
def test_rounded_offsets_are_whole_and_pass_gradients_on(square):
    torch.manual_seed(0)
    layer = HardwareDeformConv2d(2, 2, square=square, rounded=True)
    torch.nn.init.normal_(layer.conv_offset.weight)
    x = torch.randn(1, 2, 7, 6)
    offset = layer.find_offset(x)
    torch.testing.assert_close(offset, offset.round(), rtol=0, atol=1e-6)
    layer(x).square().sum().backward()
    assert layer.conv_offset.weight.grad.abs().max() > 0


def test_rounding_has_the_gradient_of_the_identity():
    offset = torch.tensor([0.2, 1.7, -2.4], requires_grad=True)
    rounded = round_offset(offset)
    torch.testing.assert_close(rounded, torch.tensor([0.0, 2.0, -2.0]))
    (gradient,) = torch.autograd.grad(rounded.sum(), offset)
    assert torch.equal(gradient, torch.ones(3))
