"""ResNet-RS: recipes and growth."""

import pytest

from omniconv.design.cost import count_cost
from omniconv.models.factory import create_model, get_variant
from omniconv.models.image.resnet_blocks import ResNetConfig
from omniconv.models.image.resnetrs import RECIPES, VARIANTS, scale


def test_every_variant_has_a_recipe_and_takes_its_last_ones_regularisation():
    last = {recipe.model: recipe for recipe in RECIPES}
    assert set(last) == set(VARIANTS)
    for name, recipe in last.items():
        variant = get_variant(name)
        assert (variant.size, variant.config.drop_rate, variant.config.drop_path_rate) == (
            recipe.resolution, recipe.drop_rate, recipe.drop_path_rate,
        )  # fmt: skip


@pytest.mark.parametrize("overfits", [True, False])
def test_growth_multiplies_the_operations(overfits):
    config = ResNetConfig((2, 2, 2), (16, 32, 64), stem="3x3", bottleneck=False)
    grown = scale(config, 3.0, overfits=overfits)
    assert (grown.widths == config.widths) == overfits
    assert (grown.depths == config.depths) != overfits
    cost = [
        count_cost(
            create_model("resnet18", stem="3x3", depths=c.depths, widths=c.widths, device="meta"), (3, 32, 32)
        ).macs
        for c in (config, grown)
    ]
    assert 2.6 < cost[1] / cost[0] < 3.5


def test_growth_by_less_than_one_is_refused():
    with pytest.raises(ValueError, match=r"factor must be above 1: got 0\.5"):
        scale(ResNetConfig(), 0.5, overfits=True)
