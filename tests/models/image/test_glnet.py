"""GLNet: where its slots start, and the official names."""

import pytest
import torch
from torch import nn

from omniconv.layers.attention.glmix import GLMix
from omniconv.models.factory import create_model
from omniconv.models.image.glnet import OFFICIAL_NAMES, GLBlock, GLNetConfig
from tests.models.image.names import assert_become_ours, batch_norm, layer


def test_slots_start_from_the_map_before_its_positions_are_encoded():
    torch.manual_seed(0)
    block = GLBlock(GLNetConfig(slots=4, head_width=4), 8, slots=True, drop=0.0).double().eval()
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    y = x + block.pos_conv(x)
    y = y + block.token_mixer(block.norm1(y), x)
    torch.testing.assert_close(block(x), y + block.mlp(block.norm2(y)))
    nn.init.ones_(block.pos_conv.weight)
    assert (block(x) - y).abs().max() > 0.1


def test_the_third_stage_mixes_slots_and_pixels_in_turn():
    model = create_model("glnet_4g", device="meta")
    slots = [[isinstance(block.token_mixer, GLMix) for block in stage.blocks] for stage in model.stages]
    assert slots == [[True] * 4, [True] * 4, [True, False] * 9, [False] * 4]


def test_official_names():
    options = {"depths": (1, 2), "widths": (16, 16), "mixers": ("slots", "both")}
    official = [
        *layer(*(f"downsample_layers.0.{place}" for place in (1, 4)), "downsample_layers.1.0", "head")
    ]
    official += batch_norm("downsample_layers.0.2", "downsample_layers.0.5", "downsample_layers.1.1", "norm")
    for block, slots in (
        ("stages.0.blocks.0", True),
        ("stages.1.blocks.0", True),
        ("stages.1.blocks.1", False),
    ):
        attention = f"{block}.relation_mha" if slots else f"{block}.mha_op"
        official += [f"{attention}.in_proj_weight", f"{attention}.in_proj_bias"]
        parts = (f"{block}.{part}" for part in ("pos_conv", "norm1", "norm2", "mlp.0", "mlp.1", "mlp.3"))
        official += [f"{block}.ls1.gamma", f"{block}.ls2.gamma", *layer(f"{attention}.out_proj", *parts)]
        if slots:
            official += [
                f"{block}.slot_scale",
                *layer(*(f"{block}.feature_conv.{place}" for place in range(3))),
            ]
    assert_become_ours(official, OFFICIAL_NAMES, create_model("glnet_test", device="meta", **options))


def test_every_stage_needs_its_mixer():
    with pytest.raises(ValueError, match="depths and mixers must be equally long"):
        GLNetConfig(mixers=("slots",))
