"""EfficientNet against its paper's table and counts."""

import pytest
import torch

from omniconv.design.cost import count_cost
from omniconv.models.factory import create_model, get_variant, list_models
from omniconv.models.image.efficientnet import EfficientNetConfig
from omniconv.models.image.mobilenetv2 import Stage


@pytest.mark.parametrize("name", list_models("efficientnet_b*") + list_models("efficientnet_lite*"))
def test_published_counts(name):
    variant = get_variant(name)
    cost = count_cost(create_model(name, device="meta"), (3, variant.size, variant.size))
    assert cost.parameters == pytest.approx(variant.params, rel=0.01)
    if variant.macs is not None:
        assert cost.macs == pytest.approx(variant.macs, rel=0.03)


@pytest.mark.parametrize(("name", "count"), [("efficientnet_b0", 5_288_548), ("efficientnet_b7", 66_347_960)])
def test_exact_parameters(name, count):
    assert sum(p.numel() for p in create_model(name, device="meta").parameters()) == count


def test_tensorflow_form_differs_in_padding_and_norm_alone():
    plain, tf = (
        create_model("efficientnet_b0", device="meta"),
        create_model("tf_efficientnet_b0", device="meta"),
    )
    assert {k: v.shape for k, v in plain.state_dict().items()} == {
        k: v.shape for k, v in tf.state_dict().items()
    }
    assert tf.bn1.eps == 1e-3
    torch.manual_seed(0)
    stages = (Stage(1, 8, 1, 1), Stage(3, 16, 2, 2, 5), Stage(3, 16, 1, 2))
    small = {"stages": stages, "stem_width": 8, "head_width": 32, "num_classes": 4}
    one = create_model("efficientnet_b0", **small).eval()
    other = create_model("efficientnet_b0", padding="same", **small).eval()
    other.load_state_dict(one.state_dict())
    odd, even = torch.randn(1, 3, 33, 49), torch.randn(1, 3, 32, 48)
    # 33 -> 17 -> 9 -> 5: odd sizes are padded alike; even ones are not.
    torch.testing.assert_close(one(odd), other(odd))
    assert not torch.allclose(one(even), other(even), atol=1e-4)


def test_repeats_are_rounded_up():
    model = create_model("efficientnet_b4", device="meta")
    assert [len(stage) for stage in model.blocks] == [2, 4, 4, 6, 6, 8, 2]
    assert model.num_features == 1792


def test_gates_are_a_quarter_of_the_block_input():
    model = create_model("efficientnet_b0", device="meta")
    assert model.blocks[0][0].se.conv_reduce.out_channels == 8
    assert model.blocks[1][0].se.conv_reduce.out_channels == 4
    assert model.blocks[6][0].se.conv_reduce.weight.shape == (48, 1152, 1, 1)


def test_stochastic_depth_rises_linearly():
    model = create_model("efficientnet_b0", device="meta")
    rates = [block.drop_path.p for stage in model.blocks for block in stage]
    assert rates == pytest.approx([0.2 * index / 16 for index in range(16)])


@pytest.mark.parametrize("name", ["efficientnet_test", "tf_efficientnet_test"])
def test_small_odd_images_and_export(name):
    model = create_model(name, num_classes=3, in_chans=1).eval()
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 3)
    dim = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        model, (torch.randn(2, 1, 43, 70),), dynamic_shapes=({0: dim, 2: dim, 3: dim},)
    )
    for size in ((3, 1, 37, 64), (1, 1, 32, 33)):
        x = torch.randn(size)
        torch.testing.assert_close(program.module()(x), model(x))


def test_defaults_are_b0():
    assert get_variant("efficientnet_b0").config == EfficientNetConfig()
