"""HaloNets: which blocks attend, and maps with and without a last convolution."""

import pytest
import torch

from omniconv.layers.attention.halo import HaloAttention
from omniconv.models.factory import create_model
from omniconv.models.image.halonet import HaloNetConfig


def test_blocks_with_the_letter_a_attend():
    model = create_model("halonet50ts", device="meta")
    names = [name for name, module in model.named_modules() if isinstance(module, HaloAttention)]
    stages = ("1.3", "2.1", "2.3", "2.5", "3.1")
    assert names == [f"stages.{place}.self_attn" for place in stages]
    with pytest.raises(ValueError, match="stages must hold the letters a and c"):
        HaloNetConfig(stages=("ab", "a", "a", "a"))


@pytest.mark.parametrize(("name", "last"), [("halonet26t", 2048), ("sehalonet33ts", 1280)])
def test_maps(name, last):
    model = create_model(name, features_only=True, device="meta")
    maps = model(torch.empty(1, 3, 64, 100, device="meta"))
    sizes = [tuple(fmap.shape[2:]) for fmap in maps]
    assert sizes == [(32, 50), (16, 25), (8, 13), (4, 7), (2, 4)]
    assert [fmap.shape[1] for fmap in maps][1:] == [256, 512, 1024, last]
