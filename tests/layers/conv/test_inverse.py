"""Corner convolutions and their inverses against flips of torch's convolution and dense Jacobians."""

import pytest
import torch
from torch.nn import functional as F

from omniconv.layers.conv.inverse import CORNERS, CornerConv2d, InverseConv2d

PADDING = {
    "top-left": (2, 0, 2, 0), "top-right": (0, 2, 2, 0), "bottom-left": (2, 0, 0, 2), "bottom-right": (0, 2, 0, 2)
}  # fmt: skip


def _layer(kind, corner="top-left"):
    torch.manual_seed(0)
    layer = kind(3, 3, corner).double()
    torch.nn.init.normal_(layer.weight, std=0.2)
    return layer


@pytest.mark.parametrize("corner", list(CORNERS))
def test_equals_a_convolution_padded_at_that_corner(corner):
    layer, x = _layer(CornerConv2d, corner), torch.randn(2, 3, 5, 7, dtype=torch.float64)
    weight = layer.weight.detach().clone()
    weight[:, :, -1, -1] = weight[:, :, -1, -1].tril(-1) + torch.eye(3)
    wanted = F.conv2d(F.pad(x, PADDING[corner]), weight.flip(layer.axes))
    torch.testing.assert_close(layer(x), wanted)


@pytest.mark.parametrize("kind", [CornerConv2d, InverseConv2d])
@pytest.mark.parametrize("corner", list(CORNERS))
def test_inverse_undoes_forward_and_volumes_stay(kind, corner):
    layer, x = _layer(kind, corner), torch.randn(1, 3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(layer.inverse(layer(x)), x)
    torch.testing.assert_close(layer(layer.inverse(x)), x)
    jacobian = torch.autograd.functional.jacobian(layer, x).reshape(60, 60)
    assert abs(torch.linalg.slogdet(jacobian)[1]) < 1e-10


def test_one_is_the_others_inverse():
    corner, inverse = _layer(CornerConv2d), _layer(InverseConv2d)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    assert torch.equal(corner(x), inverse.inverse(x))
    assert torch.equal(corner.inverse(x), inverse(x))


def test_it_says_what_it_is():
    assert (
        repr(InverseConv2d(4, 2, "bottom-right")) == "InverseConv2d(4, kernel_size=2, corner='bottom-right')"
    )
