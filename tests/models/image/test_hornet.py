"""HorNet against its published counts and the official names."""

import pytest

from omniconv.models.factory import create_model
from omniconv.models.image.hornet import OFFICIAL_NAMES, HorNetConfig
from tests.models.image.names import assert_become_ours, layer


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("hornet_tiny_7x7", 22.41e6),
        ("hornet_tiny_gf", 22.99e6),
        ("hornet_small_7x7", 49.53e6),
        ("hornet_base_7x7", 87.26e6),
    ],
)
def test_counts_of_the_official_code(name, count):
    model = create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(count, rel=1e-3)


def test_order_rises_from_stage_to_stage():
    model = create_model("hornet_tiny_gf", device="meta")
    assert [len(stage.blocks[0].token_mixer.widths) for stage in model.stages] == [2, 3, 4, 5]


def test_official_names():
    official = layer("downsample_layers.0.0", "downsample_layers.0.1", "norm", "head")
    official += layer("downsample_layers.1.0", "downsample_layers.1.1")
    for stage in (0, 1):
        block = f"stages.{stage}.0"
        official += [f"{block}.gamma1", f"{block}.gamma2"]
        official += layer(*(f"{block}.{part}" for part in ("norm1", "norm2", "pwconv1", "pwconv2")))
        official += layer(f"{block}.gnconv.proj_in", f"{block}.gnconv.proj_out", f"{block}.gnconv.pws.0")
    official += layer("stages.0.0.gnconv.dwconv", "stages.1.0.gnconv.pws.1")
    gf = "stages.1.0.gnconv.dwconv"
    official += [f"{gf}.complex_weight", *layer(f"{gf}.dw", bias=False)]
    official += layer(f"{gf}.pre_norm", f"{gf}.post_norm")
    assert_become_ours(official, OFFICIAL_NAMES, create_model("hornet_test", device="meta"))


def test_every_stage_needs_its_filter():
    with pytest.raises(ValueError, match="depths and filters must be equally long"):
        HorNetConfig(filters=(None,))
