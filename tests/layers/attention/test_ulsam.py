"""ULSAM against a loop over its subspaces and what follows from its equation."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from omniconv.layers.attention.ulsam import ULSAM, substitute_ulsam
from omniconv.models.factory import create_model


def by_loop(layer, x):
    size = x.shape[1] // layer.subspaces
    outputs = []
    for s, part in enumerate(x.split(size, 1)):
        mine = slice(s * size, (s + 1) * size)

        def norm(y, bn, mine):
            return F.batch_norm(
                y, bn.running_mean[mine], bn.running_var[mine], bn.weight[mine], bn.bias[mine]
            )

        y = norm(part * layer.conv_dws.weight[mine, 0], layer.bn_dws, mine).relu()
        y = F.max_pool2d(y, 3, 1, 1)
        y = (y * layer.conv_point.weight[s][None]).sum(1, keepdim=True)
        y = norm(y, layer.bn_point, slice(s, s + 1)).relu()
        weights = y.exp() / y.exp().sum((2, 3), keepdim=True)
        outputs.append(part + part * weights)
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("subspaces", [1, 3])
def test_it_is_the_loop_over_subspaces(subspaces):
    torch.manual_seed(0)
    layer = ULSAM(12, subspaces).double().eval()
    for tensor in layer.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    x = torch.randn(2, 12, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(layer(x), by_loop(layer, x))


@pytest.mark.parametrize("subspaces", [1, 4, 16])
def test_two_weights_a_channel_and_attention_that_sums_to_one(subspaces):
    layer = ULSAM(16, subspaces)
    assert sum(p.numel() for p in (layer.conv_dws.weight, layer.conv_point.weight)) == 32
    weights = layer.attention(torch.randn(2, 16, 6, 5))
    assert weights.shape == (2, subspaces, 6, 5)
    torch.testing.assert_close(weights.sum((2, 3)), torch.ones(2, subspaces))


def test_without_a_pointwise_filter_every_place_counts_alike():
    layer = ULSAM(8, 2).eval()
    nn.init.zeros_(layer.conv_point.weight)
    x = torch.randn(2, 8, 4, 8)
    assert torch.equal(layer(x), x + x / 32)


def test_modules_stand_for_blocks_of_a_copy():
    model = create_model("mobilenetv2_test", num_classes=5)
    images = torch.randn(1, 3, 32, 32)
    changed = substitute_ulsam(model, ["blocks.1.1"], images, 2)
    assert isinstance(changed.get_submodule("blocks.1.1"), ULSAM)
    assert not isinstance(model.get_submodule("blocks.1.1"), ULSAM)
    assert changed.training
    assert changed.eval()(images).shape == (1, 5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blocks.1.0", r"blocks.1.0 must put out what it takes: got \(1, 8, 16, 16\) to \(1, 16, 8, 8\)"),
        ("blocks.9", "names must be modules of MobileNetV2: got 'blocks.9'"),
    ],
)
def test_blocks_that_cannot_be_substituted_are_named(name, message):
    with pytest.raises(ValueError, match=message):
        substitute_ulsam(create_model("mobilenetv2_test"), [name], torch.randn(1, 3, 32, 32))
