"""ConvNeXt against its papers' tables and against itself written in other ways."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from omniconv.design.cost import count_cost
from omniconv.models.factory import create_model, get_variant, list_models
from omniconv.models.image.convnext import ConvNeXtBlock, ConvNeXtConfig


@pytest.mark.parametrize("name", list_models("convnext*"))
def test_published_counts(name):
    variant = get_variant(name)
    cost = count_cost(create_model(name, device="meta"), (3, variant.size, variant.size))
    if variant.params is not None:
        assert cost.parameters == pytest.approx(variant.params, rel=0.01)
    if variant.macs is not None:
        assert cost.macs == pytest.approx(variant.macs, rel=0.03)


def test_a_block_is_the_paper_equation():
    torch.manual_seed(0)
    block = ConvNeXtBlock(ConvNeXtConfig(layer_scale=0.3), 8, 0.0).double()
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    y = F.conv2d(F.pad(x, (3,) * 4), block.conv_dw.weight, block.conv_dw.bias, groups=8)
    mean, var = y.mean(1, keepdim=True), y.var(1, unbiased=False, keepdim=True)
    y = (y - mean) / (var + 1e-6).sqrt()
    y = torch.einsum("nchw,dc->ndhw", y, block.mlp.fc1.weight) + block.mlp.fc1.bias[:, None, None]
    y = y * 0.5 * (1 + torch.erf(y / 2**0.5))
    y = torch.einsum("nchw,dc->ndhw", y, block.mlp.fc2.weight) + block.mlp.fc2.bias[:, None, None]
    torch.testing.assert_close(block(x), x + 0.3 * y)


@pytest.mark.parametrize("name", ["convnext_test", "convnextv2_test"])
def test_linear_and_convolutional_pointwise_layers_agree(name):
    torch.manual_seed(0)
    first = create_model(name, conv_mlp=True, layer_scale=1.0).eval()
    for module in first.modules():
        if hasattr(module, "weight") and module.weight.ndim == 1:
            nn.init.normal_(module.weight)
    last = create_model(name, conv_mlp=False, layer_scale=1.0).eval()
    shapes = last.state_dict()
    last.load_state_dict({key: value.view_as(shapes[key]) for key, value in first.state_dict().items()})
    x = torch.randn(2, 3, 45, 37)
    torch.testing.assert_close(last(x), first(x), rtol=1e-5, atol=1e-5)


def test_blocks_start_as_the_identity():
    model = create_model("convnext_test")
    x = torch.randn(1, 8, 11, 9)
    assert (model.stages[0].blocks(x) - x).norm() <= 1e-5 * x.norm()


def test_stochastic_depth_rises_to_its_rate():
    model = create_model("convnext_tiny", drop_path_rate=0.1, device="meta")
    rates = [m.p for m in model.modules() if type(m).__name__ == "DropPath"]
    assert rates == pytest.approx([0.1 * i / 17 for i in range(18)])


@pytest.mark.parametrize("name", ["convnext_test", "convnextv2_test"])
def test_any_size_channels_classes_and_export(name):
    model = create_model(name, num_classes=3, in_chans=1).eval()
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 3)
    # All sizes are such that the deepest map has more than one pixel a side: one pixel is a layout of its own,
    # on which torch.export specialises.
    x = torch.randn(2, 1, 70, 101)
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    torch.testing.assert_close(model.get_classifier()(pooled), model(x))
    dim = torch.export.Dim.DYNAMIC
    program = torch.export.export(model, (x,), dynamic_shapes=({0: dim, 2: dim, 3: dim},)).module()
    other = torch.randn(3, 1, 131, 90)
    torch.testing.assert_close(program(other), model(other), rtol=1e-4, atol=1e-5)
    model.reset_classifier(5)
    assert model(x).shape == (2, 5)
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled)


def test_isotropic_form_has_one_map_of_one_size():
    model = create_model("convnext_iso_small", depths=(2,), widths=(16,), features_only=True).eval()
    assert [tuple(fmap.shape) for fmap in model(torch.randn(1, 3, 64, 96))] == [(1, 16, 4, 6)]
    assert model.feature_info.reduction() == [16]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (1, 2)}, "depths and widths must be equally long"),
        ({"kernel_size": 4}, "kernel_size must be odd and positive: got 4"),
        ({"norm_before_pool": True, "head_width": 8}, "leave norm_before_pool off"),
    ],
)
def test_impossible_configurations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ConvNeXtConfig(**options)
