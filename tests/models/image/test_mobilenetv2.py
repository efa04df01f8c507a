"""MobileNetV2 against its paper's table and counts."""

import json
from dataclasses import asdict

import pytest
import torch

from omniconv.design.cost import count_cost
from omniconv.models.factory import create_model, get_variant, list_models
from omniconv.models.image.mobilenetv2 import MobileNetV2Config, Stage


@pytest.mark.parametrize("name", list_models("mobilenetv2*"))
def test_published_counts(name):
    variant = get_variant(name)
    cost = count_cost(create_model(name, device="meta"), (3, variant.size, variant.size))
    assert cost.parameters == pytest.approx(variant.params, rel=0.01)
    if variant.macs is not None:
        assert cost.macs == pytest.approx(variant.macs, rel=0.03)


def test_exact_parameters_of_the_paper_network():
    model = create_model("mobilenetv2_100", device="meta")
    assert sum(p.numel() for p in model.parameters()) == 3_504_872


def test_maps_follow_table_2():
    # Table 2 of the paper at 224 pixels: resolutions 112, 56, 28, 14, 7 and the channels before each stride.
    model = create_model("mobilenetv2_100", features_only=True, device="meta")
    maps = model(torch.empty(1, 3, 224, 224, device="meta"))
    assert [tuple(m.shape[1:]) for m in maps] == [
        (16, 112, 112),
        (24, 56, 56),
        (32, 28, 28),
        (96, 14, 14),
        (320, 7, 7),
    ]
    assert model.feature_info.channels() == [16, 24, 32, 96, 320]
    assert model.feature_info.reduction() == [2, 4, 8, 16, 32]


def test_map_names_are_modules_that_give_them():
    model = create_model("mobilenetv2_test").eval()
    seen = {}

    def remember(name):
        def hook(module, inputs, output):
            seen[name] = output

        return hook

    for feature in model.feature_info:
        model.get_submodule(feature["module"]).register_forward_hook(remember(feature["module"]))
    maps = model.forward_stages(torch.randn(1, 3, 32, 40))
    model.forward_features(torch.randn(1, 3, 32, 40))
    for feature, fmap in zip(model.feature_info, maps, strict=True):
        assert seen[feature["module"]].shape == fmap.shape


def test_head_only_widens():
    assert create_model("mobilenetv2_035", device="meta").num_features == 1280
    assert create_model("mobilenetv2_140", device="meta").num_features == 1792


def test_fixed_ends_leave_stem_head_and_outer_stages():
    model = create_model("mobilenetv2_120d", device="meta")
    assert model.conv_stem.out_channels == 32
    assert model.num_features == 1280
    assert [len(stage) for stage in model.blocks] == [1, 3, 5, 6, 5, 5, 1]


@pytest.mark.parametrize("size", [(32, 32), (33, 47)])
def test_any_size_channels_and_classes(size):
    model = create_model("mobilenetv2_test", num_classes=5, in_chans=2).eval()
    x = torch.randn(2, 2, *size)
    assert model(x).shape == (2, 5)
    assert model.forward_features(x).shape[1] == model.num_features
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    torch.testing.assert_close(model.get_classifier()(pooled), model(x))
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)


def test_export_with_any_size():
    model = create_model("mobilenetv2_test").eval()
    dim = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        model, (torch.randn(2, 3, 44, 70),), dynamic_shapes=({0: dim, 2: dim, 3: dim},)
    )
    x = torch.randn(3, 3, 37, 64)
    torch.testing.assert_close(program.module()(x), model(x))


def test_config_survives_json():
    config = MobileNetV2Config(width=0.5, stages=(Stage(1, 8, 1, 2), Stage(6, 16, 2, 2, 5)))
    assert MobileNetV2Config(**json.loads(json.dumps(asdict(config)))) == config
    with pytest.raises(ValueError, match="act must be one of"):
        MobileNetV2Config(act="gelu")
