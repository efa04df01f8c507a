"""Parameterised hypercomplex layers against numpy's Kronecker product, complex numbers and Hamilton's product."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from omniconv.layers.conv.phconv import (
    PHConv1d,
    PHConv2d,
    PHConv3d,
    PHLinear,
    hypercomplex,
    multiplication_table,
)
from omniconv.layers.conv.reparam import reparameterize
from omniconv.models.factory import create_model


def hamilton(a, b):
    """Multiply two quaternions (4,) from ij = k, jk = i, ki = j alone."""
    product = np.zeros(4)
    product[0] = a[0] * b[0] - a[1:] @ b[1:]
    product[1:] = a[0] * b[1:] + b[0] * a[1:] + np.cross(a[1:], b[1:])
    return product


def test_the_table_of_quaternions_is_hamiltons_product():
    table = multiplication_table("quaternion").numpy()
    random = np.random.default_rng(0)
    for _ in range(10):
        a, b = random.normal(size=(2, 4))
        np.testing.assert_allclose(np.einsum("ipq,i,q->p", table, a, b), hamilton(a, b), atol=1e-6)


def test_kernels_are_numpys_kronecker_products():
    torch.manual_seed(0)
    layer = PHConv2d(6, 9, 3, n=3).double()
    kernel = layer.kernel().detach().numpy()
    a, f = layer.A.detach().numpy(), layer.F.detach().numpy().reshape(3, 3, 2, 3, 3)
    for u in range(3):
        for v in range(3):
            expected = sum(np.kron(a[i], f[i, :, :, u, v]) for i in range(3))
            np.testing.assert_allclose(kernel[:, :, u, v], expected, atol=1e-12)


def test_complex_layers_convolve_complex_numbers():
    torch.manual_seed(0)
    layer = PHConv1d(4, 6, 3, n=2, bias=False, algebra="complex", fixed=True).double()
    x = torch.randn(2, 4, 9, dtype=torch.float64)
    weight = torch.complex(*layer.F.chunk(2))
    expected = F.conv1d(torch.complex(x[:, :2], x[:, 2:]), weight)
    torch.testing.assert_close(layer(x), torch.cat([expected.real, expected.imag], 1))
    assert "A" not in dict(layer.named_parameters())


@pytest.mark.parametrize(
    ("layer", "ordinary"), [(PHConv1d, nn.Conv1d), (PHConv2d, nn.Conv2d), (PHConv3d, nn.Conv3d)]
)
def test_one_part_and_the_number_one_are_an_ordinary_convolution(layer, ordinary):
    torch.manual_seed(0)
    ours, theirs = layer(4, 6, 3, n=1), ordinary(4, 6, 3)
    ours.load_state_dict({"A": torch.ones(1, 1, 1), "F": theirs.weight, "bias": theirs.bias})
    x = torch.randn(2, 4, *(7, 5, 6)[: theirs.weight.ndim - 2])
    assert torch.equal(ours(x), theirs(x))


def test_a_learned_algebra_starts_at_the_scale_of_torchs_layers():
    torch.manual_seed(0)
    for made in (PHLinear(256, 256, n=4), PHLinear(256, 256, n=4, algebra="quaternion")):
        ratio = made.kernel().std() / nn.Linear(256, 256).weight.std()
        assert 0.75 < ratio < 1.33


def test_networks_keep_shapes_and_merge_to_ordinary_convolutions():
    torch.manual_seed(0)
    model = create_model("resnet_test", num_classes=5, in_chans=4)
    converted = hypercomplex(model, 4)
    kinds = [type(m) for m in converted.modules() if isinstance(m, PHConv2d | nn.Conv2d)]
    assert kinds.count(nn.Conv2d) == 0
    assert not any(isinstance(m, PHConv2d) for m in model.modules())
    first, replaced = model.get_submodule("conv1"), converted.get_submodule("conv1")
    assert isinstance(first, nn.Conv2d)
    assert isinstance(replaced, PHConv2d)
    rms = replaced.kernel().square().mean() / first.weight.square().mean()
    torch.testing.assert_close(rms, torch.tensor(1.0))
    x = torch.randn(2, 4, 32, 24)
    merged = reparameterize(converted)
    assert not any(isinstance(m, PHConv2d) for m in merged.modules())
    torch.testing.assert_close(merged(x), converted.eval()(x))


def test_what_n_does_not_divide_or_is_in_groups_stays():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1))
    kinds = [type(m) for m in hypercomplex(model, 4)]
    assert kinds == [nn.Conv2d, nn.Conv2d, PHConv2d]
