"""A transformer's latency from a table: sums over its blocks, linear between the places that were measured."""

import pytest
from torch import nn

from omniconv.design import vit_latency
from omniconv.design.vit_latency import LatencyTable, head_widths
from omniconv.models.image.vit import VisionTransformer, ViTConfig

SHAPE = (3, 16, 16)


def weigh(call, x, repeats):
    """Stand for time: weights of the module that is called, and what a call takes."""
    module = call if isinstance(call, nn.Module) else call.__closure__[0].cell_contents[1]
    call(x)
    return 1.0 + sum(p.numel() for p in module.parameters() if p.ndim == 2)


def test_what_lies_between_is_interpolated(monkeypatch):
    """Weights of both layers are bilinear in the widths, so a table of them is exact everywhere."""
    monkeypatch.setattr(vit_latency, "_time", weigh)
    model = VisionTransformer(ViTConfig(24, 2, 3, 4, 16, mlp_ratio=1.5), num_classes=5)
    table = LatencyTable(model, SHAPE)
    whole = table.predict(model)
    attention = model.blocks[0].attn
    assert head_widths(attention) == (8, 8)
    attention.qkv, attention.proj = nn.Linear(24, 3 * (2 * 5 + 7)), nn.Linear(3 * 7, 24)
    assert head_widths(attention) == (5, 7)
    gone = 24 * 3 * (2 * 3 + 1) + 24 * 3
    assert whole - table.predict(model) == pytest.approx(gone)


def test_times_are_positive_and_blocks_known():
    model = VisionTransformer(ViTConfig(8, 1, 2, 4, 16, mlp_ratio=1), num_classes=5)
    assert LatencyTable(model, SHAPE, repeats=1).predict(model) > 0
    model.blocks = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="knows the blocks of VisionTransformer, not Linear"):
        LatencyTable(model, SHAPE)
