"""The path from ResNet-50 to ConvNeXt-T against its table and its two ends."""

import pytest
import torch

from omniconv.design.cost import count_cost
from omniconv.models.factory import create_model, get_variant, list_models
from omniconv.models.image.modernized_resnet import ModernizedResNetConfig


@pytest.mark.parametrize("name", list_models("modernized_resnet*"))
def test_every_step_costs_what_table_10_says(name):
    published = get_variant(name).macs
    cost = count_cost(create_model(name, device="meta"), (3, 224, 224))
    if published is not None:
        assert cost.macs == pytest.approx(published, rel=0.01)


def test_it_begins_as_resnet50():
    torch.manual_seed(0)
    options = {"num_classes": 4, "depths": (1, 2), "widths": (64, 8)}
    path, resnet = create_model("modernized_resnet50", **options), create_model("resnet50", **options)
    state, names = path.state_dict(), iter(resnet.state_dict())
    order = sorted(state, key=lambda name: ("fc" in name, 0))
    # Both list a block's branch before its shortcut, so parameters correspond by their order.
    resnet.load_state_dict({theirs: state[name] for name, theirs in zip(order, names, strict=True)})
    x = torch.randn(2, 3, 64, 45)
    torch.testing.assert_close(path.eval()(x), resnet.eval()(x), rtol=1e-4, atol=1e-4)


def test_it_ends_as_convnext_without_layer_scale():
    torch.manual_seed(0)
    options = {"num_classes": 4, "depths": (1, 2), "widths": (8, 12)}
    path = create_model("modernized_resnet50_downsampling", **options)
    convnext = create_model("convnext_tiny", conv_mlp=True, layer_scale=None, **options)
    state, names = path.state_dict(), iter(convnext.state_dict())
    convnext.load_state_dict({theirs: state[name] for name, theirs in zip(state, names, strict=True)})
    x = torch.randn(2, 3, 64, 45)
    torch.testing.assert_close(path.eval()(x), convnext.eval()(x), rtol=1e-4, atol=1e-4)


def test_any_size_channels_classes_and_export():
    model = create_model("modernized_resnet_test", num_classes=3, in_chans=1).eval()
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 3)
    dim = torch.export.Dim.DYNAMIC
    x = torch.randn(2, 1, 43, 70)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: dim, 2: dim, 3: dim},)).module()
    other = torch.randn(3, 1, 65, 47)
    torch.testing.assert_close(program(other), model(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inverted": True}, "inverted needs depthwise"),
        ({"depthwise_first": True}, "depthwise_first needs inverted"),
        ({"few_norms": True}, "need depthwise_first"),
        ({"kernel_size": 6}, "kernel_size must be odd and positive: got 6"),
    ],
)
def test_switches_come_in_order(options, message):
    with pytest.raises(ValueError, match=message):
        ModernizedResNetConfig(**options)
