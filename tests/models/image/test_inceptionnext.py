"""InceptionNeXt; timm's own is compared in test_timm_parity."""

import pytest

from omniconv.models.factory import create_model
from omniconv.models.image.inceptionnext import InceptionNeXtConfig


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("inception_next_tiny", 28.056e6),
        ("inception_next_small", 49.374e6),
        ("inception_next_base", 86.672e6),
    ],
)
def test_counts_of_the_public_weights(name, count):
    model = create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(count, rel=1e-4)


def test_the_last_stage_has_the_narrower_mlp():
    model = create_model("inception_next_test", device="meta")
    assert [stage.blocks[0].mlp.fc1.out_channels for stage in model.stages] == [32, 72]


def test_every_stage_needs_its_mlp_ratio():
    with pytest.raises(ValueError, match="depths and mlp_ratios must be equally long"):
        InceptionNeXtConfig(mlp_ratios=(4, 4))
