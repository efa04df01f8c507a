"""SimpleNet against the widths, names and design rules of its authors."""

import pytest
import torch
from torch import nn

from omniconv.models.factory import create_model


def convolutions(name, **options):
    model = create_model(name, device="meta", **options)
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("simplenet_cifar_5m", (64, 128, 128, 128, 128, 128, 256, 256, 256, 512, 2048, 256, 256)),
        ("simplenet_cifar_310k", (64, 32, 32, 32, 32, 32, 64, 64, 64, 128, 256, 64, 64)),
        ("simplenetv1_small_m2_075", (48, 96, 96, 96, 96, 96, 192, 192, 192, 384, 1536, 192, 192)),
    ],
)
def test_thirteen_convolutions_and_the_only_small_ones_are_late(name, widths):
    found = convolutions(name)
    assert tuple(conv.out_channels for conv in found) == widths
    assert [index for index, conv in enumerate(found) if conv.kernel_size == (1, 1)] == [10, 11]


def test_strides_of_the_imagenet_forms():
    assert [conv.stride[0] for conv in convolutions("simplenetv1_5m_m1")][:5] == [2, 2, 2, 1, 1]
    assert [conv.stride[0] for conv in convolutions("simplenetv1_5m_m2")][:5] == [2, 2, 1, 2, 1]


def test_names_are_those_of_the_public_weights():
    # Typed from the layout of the authors' code: convolution, batch norm, ReLU, dropout; no dropout before a pooling.
    keys = set(create_model("simplenet_cifar_5m", num_classes=10, device="meta").state_dict())
    places = [0, 4, 8, 12, 17, 21, 25, 30, 34, 39, 43, 47, 52]
    assert {key for key in keys if key.endswith("running_var")} == {
        f"features.{place + 1}.running_var" for place in places
    }
    keys = set(create_model("simplenetv1_5m_m2", device="meta").state_dict())
    places = [0, 4, 8, 12, 16, 20, 26, 30, 34, 38, 44, 48, 52]
    assert {f"features.{place}.weight" for place in places} | {"classifier.weight"} <= keys


def test_the_head_takes_maxima():
    torch.manual_seed(0)
    model = create_model("simplenet_test").eval()
    features = model.forward_features(x := torch.randn(2, 3, 40, 33))
    peaks = torch.stack([features[:, c].flatten(1).max(1).values for c in range(features.shape[1])], 1)
    torch.testing.assert_close(model(x), model.classifier(peaks))


def test_dropout_takes_whole_channels_in_training_only():
    model = create_model("simplenet_test", drop_rate=0.5, head_drop_rate=0.5)
    x = torch.randn(8, 3, 32, 32)
    maps = model.train().forward_stages(x)
    assert not torch.equal(model(x), model(x))
    assert (maps[0].flatten(2).std(2) > 0).all(), (
        "no dropout between a group's last convolution and its pooling"
    )
    model.eval()
    assert torch.equal(model(x), model(x))
