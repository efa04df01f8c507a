"""VGG against tables 1 and 2 of its paper."""

import pytest
import torch
from torch.nn import functional as F

from omniconv.models.factory import create_model
from omniconv.models.image.vgg import VGGConfig


@pytest.mark.parametrize(
    ("name", "layers", "millions"),
    [("vgg11", 11, 133), ("vgg13", 13, 133), ("vgg16", 16, 138), ("vgg19", 19, 144)],
)
def test_layers_and_parameters_of_the_table(name, layers, millions):
    model = create_model(name, device="meta")
    weights = [p for p in model.parameters() if p.ndim > 1]
    assert len(weights) == layers
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


def test_maps_are_those_before_each_pooling_and_the_last():
    model = create_model("vgg16", features_only=True, device="meta")
    maps = model(torch.empty(1, 3, 224, 224, device="meta"))
    wanted = [(64, 224), (128, 112), (256, 56), (512, 28), (512, 14), (512, 7)]
    assert [(fmap.shape[1], fmap.shape[2]) for fmap in maps] == wanted


@torch.no_grad()
def test_the_head_is_fully_connected_on_a_map_of_the_windows_size():
    torch.manual_seed(0)
    model = create_model("vgg_test", num_classes=5).eval()
    x = torch.randn(2, model.num_features, 3, 3)
    hidden = F.linear(x.flatten(1), model.pre_logits.fc1.weight.flatten(1), model.pre_logits.fc1.bias).relu()
    hidden = F.linear(hidden, model.pre_logits.fc2.weight.flatten(1), model.pre_logits.fc2.bias).relu()
    torch.testing.assert_close(model.forward_head(x), model.head.fc(hidden))


def test_depths_and_widths_belong_together():
    with pytest.raises(ValueError, match="equally long"):
        VGGConfig((1, 2))
