"""FlashInternImage: names of the public weights, and the block against its equation."""

import pytest
import torch
from torch.nn import functional as F

from omniconv.models.factory import create_model
from omniconv.models.image.flash_internimage import FlashInternImageConfig


def test_names_are_those_of_the_public_weights():
    names = set(create_model("flash_internimage_small", device="meta").state_dict())
    block = "levels.2.blocks.20."
    parts = {name.removeprefix(block) for name in names if name.startswith(block)}
    both = ("dcn.offset_mask_dw", "dcn.offset_mask", "dcn.value_proj", "mlp.fc1", "norm1.0", "norm2.0")
    wanted = {f"{layer}.{kind}" for layer in both for kind in ("weight", "bias")}
    assert parts == wanted | {"dcn.output_proj.weight", "mlp.fc2.weight", "gamma1", "gamma2"}
    assert {
        "patch_embed.conv1.bias", "patch_embed.norm1.1.weight", "patch_embed.norm2.1.bias", "conv_head.0.weight",
        "levels.0.downsample.conv.weight", "levels.2.downsample.norm.1.bias", "conv_head.1.0.running_mean", "head.bias",
    } <= names  # fmt: skip
    assert (
        not {"levels.3.downsample.conv.weight", "levels.0.norm.0.weight", "levels.0.downsample.conv.bias"}
        & names
    )
    assert "levels.0.norm.0.weight" in create_model("flash_internimage_tiny", device="meta").state_dict()


@pytest.mark.parametrize(("name", "groups"), [("tiny", 32), ("small", 40), ("base", 56), ("large", 80)])
def test_groups_are_sixteen_channels_wide(name, groups):
    model = create_model(f"flash_internimage_{name}", device="meta")
    assert model.levels[3].blocks[0].dcn.groups == groups


@pytest.mark.parametrize("post_norm", [False, True])
@torch.no_grad()
def test_a_block_is_its_equation(post_norm):
    torch.manual_seed(0)
    block = create_model("flash_internimage_test", post_norm=post_norm).eval().levels[1].blocks[0]
    for parameter in block.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    x = torch.randn(1, 16, 5, 6)

    def norm(layer, y):
        return F.layer_norm(y.movedim(1, -1), (16,), layer[0].weight, layer[0].bias, 1e-6).movedim(-1, 1)

    def mlp(y):
        hidden = F.gelu(F.linear(y.movedim(1, -1), block.mlp.fc1.weight, block.mlp.fc1.bias))
        return F.linear(hidden, block.mlp.fc2.weight).movedim(-1, 1)

    wanted = x
    for layer, behind, gamma in ((block.dcn, block.norm1, block.gamma1), (mlp, block.norm2, block.gamma2)):
        branch = norm(behind, layer(wanted)) if post_norm else layer(norm(behind, wanted))
        wanted = wanted + gamma.view(-1, 1, 1) * branch
    torch.testing.assert_close(block(x), wanted)


def test_groups_must_fit():
    with pytest.raises(ValueError, match="group_width must divide width: got 16 and 24"):
        FlashInternImageConfig(width=24)
