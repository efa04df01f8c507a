"""IBN: which half forgets contrast, and networks turned into their IBN-a form."""

import pytest
import torch
from torch import nn

from omniconv.layers.norm.ibn import IBN, ibn_a
from omniconv.models.factory import create_model


def test_halves_are_those_of_torch():
    layer = IBN(7, 0.45).train()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    instance = nn.InstanceNorm2d(3, affine=True)
    batch = nn.BatchNorm2d(4)
    instance.load_state_dict(layer.IN.state_dict())
    batch.load_state_dict(layer.BN.state_dict())
    x = torch.randn(2, 7, 5, 4)
    expected = torch.cat((instance(x[:, :3]), batch(x[:, 3:])), 1)
    torch.testing.assert_close(layer(x), expected)


def test_one_half_forgets_contrast_and_brightness():
    layer, x = IBN(8), torch.randn(3, 8, 9, 9)
    a, b = torch.rand(3, 8, 1, 1) * 4 + 0.5, torch.randn(3, 8, 1, 1)
    change = (layer(a * x + b) - layer(x)).abs().amax((0, 2, 3))
    assert change[:4].max() < 1e-3
    assert change[4:].min() > 0.1


@pytest.mark.parametrize("name", ["resnet50", "seresnet18", "resnext50_32x4d"])
def test_the_turned_network_is_the_configured_one(name):
    small = {"num_classes": 3, "depths": (1, 1, 1, 1), "widths": (8, 8, 8, 8)}
    small |= {"cardinality": 2, "base_width": 16} if "resnext" in name else {}
    plain = create_model(name, **small).eval()
    turned, configured = ibn_a(plain), create_model(name, ibn="a", **small).eval()
    configured.load_state_dict(turned.state_dict())
    x = torch.randn(2, 3, 40, 48)
    torch.testing.assert_close(turned(x), configured(x))
    assert sum(p.numel() for p in turned.parameters()) == sum(p.numel() for p in plain.parameters())
    assert not any(isinstance(m, IBN) for m in plain.modules()), "the network itself stays as it is"


def test_densely_connected_names_are_found():
    blocks = {
        f"denseblock{i}": nn.ModuleDict({"denselayer1": nn.ModuleDict({"norm1": nn.BatchNorm2d(4)})})
        for i in (1, 2, 3, 4)
    }
    turned = ibn_a(nn.ModuleDict({"features": nn.ModuleDict(blocks)}))
    found = [name for name, module in turned.named_modules() if isinstance(module, IBN)]
    assert found == [f"features.denseblock{i}.denselayer1.norm1" for i in (1, 2, 3)]


def test_a_network_without_such_norms_is_refused():
    with pytest.raises(ValueError, match="no batch norm is called like 'norm7'"):
        ibn_a(nn.Sequential(nn.BatchNorm2d(3)), "norm7")
