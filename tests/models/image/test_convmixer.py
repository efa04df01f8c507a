"""ConvMixer against its equation, and what its pixels can see."""

import pytest
import torch
from torch.nn import functional as F

from omniconv.models.factory import create_model
from omniconv.models.image.convmixer import ConvMixerConfig, make_block


@pytest.mark.parametrize("kernel", [5, 4])
def test_a_block_is_the_papers_equation(kernel):
    torch.manual_seed(0)
    block = make_block(ConvMixerConfig(6, 1, kernel)).double().eval()
    x = torch.randn(2, 6, 9, 7, dtype=torch.float64)
    depthwise, norm, pointwise, last = block[0].fn[0], block[0].fn[2], block[1], block[3]
    for module in (norm, last):
        torch.nn.init.normal_(module.weight)
        torch.nn.init.normal_(module.bias)

    def finish(y, bn):
        y = y * 0.5 * (1 + torch.erf(y / 2**0.5))
        return bn.weight[:, None, None] * y / (1 + bn.eps) ** 0.5 + bn.bias[:, None, None]

    before, after = (kernel - 1) // 2, kernel // 2
    padded = F.pad(x, (before, after, before, after))
    y = x + finish(F.conv2d(padded, depthwise.weight, depthwise.bias, groups=6), norm)
    z = torch.einsum("nchw,dc->ndhw", y, pointwise.weight[:, :, 0, 0]) + pointwise.bias[:, None, None]
    torch.testing.assert_close(block(x), finish(z, last))


@pytest.mark.parametrize(("patch", "kernel", "depth", "size"), [(2, 5, 2, 32), (3, 4, 3, 48), (2, 5, 3, 20)])
def test_a_pixel_of_the_last_map_sees_p_times_one_plus_d_times_k_minus_one(patch, kernel, depth, size):
    torch.manual_seed(0)
    model = create_model("convmixer_test", width=4, depth=depth, kernel_size=kernel, patch_size=patch)
    x = torch.randn(1, 3, size, size, dtype=torch.float64, requires_grad=True)
    features = model.double().eval().forward_features(x)
    middle = features.shape[2] // 2
    (gradient,) = torch.autograd.grad(features[0, :, middle, middle].sum(), x)
    seen = gradient.abs().sum((0, 1)) > 0
    wanted = min(size, patch * (1 + depth * (kernel - 1)))
    assert int(seen.any(0).sum()) == int(seen.any(1).sum()) == wanted


def test_every_block_keeps_the_shape():
    model = create_model("convmixer_test", features_only=True)
    assert [tuple(y.shape) for y in model(torch.randn(1, 3, 33, 50))] == [(1, 24, 8, 12)] * 2
