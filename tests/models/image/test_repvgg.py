"""RepVGG against its paper's table, and its deployed form against the form that trains."""

import pytest
import torch
from torch import nn

from omniconv.design.cost import count_cost
from omniconv.models.factory import create_model, get_variant, list_models


@pytest.mark.parametrize("name", list_models("repvgg*"))
def test_published_counts(name):
    variant = get_variant(name)
    model = create_model(name, device="meta")
    cost = count_cost(model.deploy() if variant.deployed else model, (3, variant.size, variant.size))
    assert cost.parameters == pytest.approx(variant.params, rel=0.01)
    assert cost.macs == pytest.approx(variant.macs, rel=0.03)


@pytest.mark.parametrize(("name", "count"), [("repvgg_a0", 9.11e6), ("repvgg_b1", 57.42e6)])
def test_published_counts_of_the_form_that_trains(name, count):
    total = sum(p.numel() for p in create_model(name, device="meta").parameters())
    assert total == pytest.approx(count, rel=0.005)


def test_deploy_changes_the_form_and_not_the_answer():
    torch.manual_seed(0)
    model = create_model("repvgg_test", num_classes=7).double().eval()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_var, 0.5, 2)
            for tensor in (m.running_mean, m.weight, m.bias):
                nn.init.normal_(tensor, 0.2)
    deployed = model.deploy()
    x = torch.randn(2, 3, 45, 64, dtype=torch.float64)
    torch.testing.assert_close(deployed(x), model(x), rtol=1e-10, atol=1e-10)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in deployed.modules())
    # The maps stay where feature_info says.
    for feature, fmap in zip(deployed.feature_info, deployed.forward_stages(x), strict=True):
        assert fmap.shape[1] == feature["num_chs"]
        assert deployed.get_submodule(feature["module"]) is not None


def test_every_second_block_of_a_stage_is_grouped():
    model = create_model("repvgg_b1g4", device="meta")
    groups = [[block.conv_kxk.conv.groups for block in stage] for stage in model.stages]
    assert groups[0] == [1, 4, 1, 4]
    assert groups[3] == [1]
    assert model.stem.conv_kxk.conv.groups == 1


def test_any_size_channels_classes_and_export():
    model = create_model("repvgg_test", num_classes=3, in_chans=1).eval()
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 3)
    x = torch.randn(2, 1, 33, 47)
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    torch.testing.assert_close(model.get_classifier()(pooled), model(x))
    dim = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        model.deploy(), (torch.randn(2, 1, 43, 70),), dynamic_shapes=({0: dim, 2: dim, 3: dim},)
    )
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)
