"""ConViT: what starts as a convolution, and where the class token joins."""

from typing import Any

import pytest
import torch

from omniconv.layers.attention.gpsa import GatedPositionalSelfAttention
from omniconv.layers.attention.self_attention import SelfAttention
from omniconv.models.factory import create_model


def test_blocks_start_as_convolutions_and_the_last_do_not():
    model: Any = create_model("convit_test")
    first, last = (block.attn for block in model.blocks)
    assert isinstance(first, GatedPositionalSelfAttention)
    assert isinstance(last, SelfAttention)
    assert torch.equal(first.v.weight, torch.eye(24))
    assert torch.equal(first.pos_proj.weight[:, 2], -torch.ones(4))
    assert first.qk.weight.std() < 0.03


def test_counts_of_the_official_code():
    counts = {"convit_tiny": 5_710_512, "convit_small": 27_778_329, "convit_base": 86_540_392}
    for name, wanted in counts.items():
        found = sum(p.numel() for p in create_model(name, device="meta").parameters())
        assert abs(found - wanted) < 1e-3 * wanted, name


def test_a_block_must_be_left_for_the_class_token():
    with pytest.raises(ValueError, match="local_blocks must be fewer than depth: got 2 and 2"):
        create_model("convit_test", local_blocks=2)


def test_heads_that_look_at_places_cannot_be_anchored():
    with pytest.raises(ValueError, match="ConViT cannot be anchored"):
        create_model("convit_test", anchored=True)
