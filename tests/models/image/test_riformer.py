"""RIFormer: what its mixers fold into, and the official names."""

import torch
from torch import nn
from torch.nn import functional as F

from omniconv.models.factory import create_model
from omniconv.models.image.riformer import OFFICIAL_NAMES, AffineBlock
from tests.models.image.names import assert_become_ours, layer


def test_a_block_is_the_paper_equation_and_folds_into_its_norm():
    torch.manual_seed(0)
    block = AffineBlock(6, 0.1, 0.0).double().eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 6, 5, 3, dtype=torch.float64)
    y = F.group_norm(x, 1, block.norm1.weight, block.norm1.bias)
    affine = block.token_mixer.affine
    mixed = affine.weight[:, 0] * y + affine.bias[:, None, None] - y
    y = x + block.layer_scale1.scale[:, None, None] * mixed
    y = y + block.layer_scale2.scale[:, None, None] * block.mlp(block.norm2(y))
    torch.testing.assert_close(block(x), y)
    merged = block.merged()
    assert isinstance(merged.token_mixer, nn.Identity)
    torch.testing.assert_close(merged(x), y)


def test_it_starts_from_the_weights_of_a_poolformer():
    names = set(create_model("poolformer_s12", device="meta").state_dict())
    missing = set(create_model("riformer_s12", device="meta").state_dict()) - names
    assert missing == {name for name in missing if ".token_mixer.affine." in name}


def test_official_names():
    official = layer("backbone.patch_embed.proj", "backbone.network.1.proj", "backbone.norm6", "head.fc")
    for block in ("backbone.network.0.0", "backbone.network.2.0"):
        official += [f"{block}.layer_scale_1", f"{block}.layer_scale_2"]
        parts = ("norm1", "token_mixer.affine", "norm2", "mlp.fc1", "mlp.fc2")
        official += layer(*(f"{block}.{part}" for part in parts))
    assert_become_ours(official, OFFICIAL_NAMES, create_model("riformer_test", device="meta"))
