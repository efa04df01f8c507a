"""UniRepLKNet against its tables, and its deployed form against the form that trains."""

import pytest
import torch
from torch import nn

from omniconv.design.cost import count_cost
from omniconv.models.factory import create_model, get_variant, list_models


def _randomise(model: nn.Module) -> None:
    """Give every parameter and statistic a say: published scales of 1e-6 would hide all but the shortcuts."""
    for name, value in model.state_dict().items():
        if "running_var" in name:
            nn.init.uniform_(value, 0.5, 2)
        elif value.is_floating_point() and (value.ndim == 1 or "act" in name):
            nn.init.normal_(value, 0.3, 0.3)
        elif value.ndim > 1:
            nn.init.normal_(value, 0, (2 / value[0].numel()) ** 0.5)


@pytest.mark.parametrize("name", list_models("unireplknet*"))
def test_published_counts_of_the_deployed_form(name):
    variant = get_variant(name)
    cost = count_cost(create_model(name, device="meta").deploy(), (3, variant.size, variant.size))
    assert cost.parameters == pytest.approx(variant.params, rel=0.01)
    if variant.macs is not None:
        assert cost.macs == pytest.approx(variant.macs, rel=0.03)


@pytest.mark.parametrize(
    ("name", "training", "deployed"),
    [
        ("unireplknet_a", None, 4.437e6),
        ("unireplknet_t", 31.693e6, 31.038e6),
        ("unireplknet_s", None, 55.646e6),
    ],
)
def test_counts_of_the_official_code(name, training, deployed):
    model = create_model(name, device="meta")
    assert sum(p.numel() for p in model.deploy().parameters()) == pytest.approx(deployed, rel=1e-4)
    if training:
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(training, rel=1e-4)


@pytest.mark.parametrize("kernel_size", [5, 7, 9, 11, 13, 15, 17])
def test_deploy_changes_the_form_and_not_the_answer(kernel_size):
    torch.manual_seed(0)
    model = create_model("unireplknet_test", num_classes=7, kernel_size=kernel_size).double().eval()
    _randomise(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    deployed = model.deploy()
    x = torch.randn(2, 3, 45, 64, dtype=torch.float64)
    torch.testing.assert_close(deployed(x), model(x), rtol=1e-10, atol=1e-10)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in deployed.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(deployed.deploy()(x), deployed(x))


def test_the_bias_of_the_response_norm_moves_into_the_second_linear_layer():
    torch.manual_seed(0)
    model = create_model("unireplknet_test").eval()
    _randomise(model)
    block = model.stages[1][0]
    x = torch.randn(1, 16, 9, 9)
    merged = block.merged()
    assert merged.act[1].beta is None
    torch.testing.assert_close(merged(x), block(x), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        block.act[1].beta.add_(1)
    assert (block(x) - merged(x)).abs().max() > 0.01
    torch.testing.assert_close(block.merged()(x), block(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "third"),
    [("unireplknet_a", [13] * 6), ("unireplknet_t", [13, 3] * 9), ("unireplknet_s", [13, 3, 3] * 9)],
)
def test_where_the_large_kernels_are(name, third):
    config = get_variant(name).config
    assert [config.kernel(2, block) for block in range(config.depths[2])] == third
    assert {config.kernel(0, block) for block in range(config.depths[0])} == {3}
    assert {config.kernel(stage, block) for stage in (1, 3) for block in range(config.depths[stage])} == {13}


def test_names_are_those_of_the_public_weights():
    names = set(create_model("unireplknet_t", device="meta").state_dict())
    block = "stages.1.0."
    branches = ("k5_1", "k7_2", "k3_3", "k3_4", "k3_5")
    assert {name.removeprefix(block).rsplit(".", 1)[0] for name in names if name.startswith(block)} == {
        *(f"dwconv.dil_{part}_{branch}" for part in ("conv", "bn") for branch in branches),
        "dwconv.lk_origin", "dwconv.origin_bn", "norm", "se.down", "se.up", "pwconv1.1", "act.1", "pwconv2.0",
        "pwconv2.2", "gamma",
    }  # fmt: skip
    assert {"stages.0.0.dwconv.weight", "downsample_layers.0.4.bias", "norm.weight", "head.bias"} <= names
    assert "pwconv2.0.bias" not in names


def test_any_size_channels_classes_and_export():
    model = create_model("unireplknet_test", num_classes=3, in_chans=1).eval()
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 3)
    x = torch.randn(2, 1, 70, 101)
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    torch.testing.assert_close(model.get_classifier()(pooled), model(x))
    dim = torch.export.Dim.DYNAMIC
    for form in (model, model.deploy()):
        program = torch.export.export(form, (x,), dynamic_shapes=({0: dim, 2: dim, 3: dim},)).module()
        other = torch.randn(3, 1, 131, 90)
        torch.testing.assert_close(program(other), form(other), rtol=1e-4, atol=1e-5)
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled)


def test_depths_widths_and_kernels_must_agree():
    with pytest.raises(ValueError, match="must be equally long"):
        create_model("unireplknet_test", depths=(1, 2))
