"""Poincare ResNet: depths, and where its maps live."""

import pytest
import torch

from omniconv.layers.geometry.poincare import PoincareConv2d, PoincareLinear
from omniconv.models.factory import create_model
from omniconv.ops.poincare import expmap0


@pytest.mark.parametrize(
    ("name", "depth"), [("hyperbolic_4_8_16_resnet20", 20), ("hyperbolic_8_16_32_resnet32", 32)]
)
def test_depth_is_six_n_plus_two(name, depth):
    model = create_model(name, num_classes=10, device="meta")
    convolutions = [m for m in model.modules() if isinstance(m, PoincareConv2d) and m.weight.shape[2] == 3]
    assert len(convolutions) + sum(isinstance(m, PoincareLinear) for m in model.modules()) == depth


def test_maps_stand_for_points_of_the_ball():
    torch.manual_seed(0)
    model = create_model("hyperbolic_test", features_only=True)
    maps = model(3 * torch.randn(2, 3, 17, 22))
    assert [tuple(y.shape[1:]) for y in maps] == [(8, 17, 22), (16, 9, 11)]
    for y in maps:
        assert (0.1**0.5 * expmap0(y, 0.1, 1).norm(dim=1) < 1).all()
