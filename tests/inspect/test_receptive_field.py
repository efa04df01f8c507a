"""Receptive fields against closed forms of convolutions."""

import numpy as np
import pytest
import torch
from torch import nn

from omniconv.core.errors import UsageError
from omniconv.inspect.receptive_field import ReceptiveField, receptive_field
from omniconv.models.factory import create_model


def test_contributions_of_a_convolution_are_its_weights():
    conv = nn.Conv2d(1, 1, (3, 5), padding=(1, 2))
    field = receptive_field(conv, torch.randn(2, 1, 9, 11), unit=(4, 6))
    expected = np.zeros((9, 11), np.float32)
    expected[3:6, 4:9] = conv.weight.detach().abs()[0, 0].numpy()
    np.testing.assert_allclose(field.data["contribution"], expected)
    assert field.bounds == (3, 5, 4, 8)


def test_support_grows_with_every_layer_and_stops_at_the_border():
    layers = nn.Sequential(*(nn.Conv2d(3, 3, 7, padding=3) for _ in range(2)))
    assert receptive_field(layers, torch.randn(1, 3, 31, 31)).bounds == (9, 21, 9, 21)
    assert receptive_field(layers, torch.randn(1, 3, 31, 31), unit=(0, 30)).bounds == (0, 6, 24, 30)


def test_a_layer_norm_hides_nothing():
    norm = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(1, 8))
    # A plain sum over the normed channels would be constant.
    assert receptive_field(norm, torch.randn(1, 3, 5, 5)).data["contribution"].min() > 1e-6


def test_area_ratio():
    contribution = np.zeros((9, 9))
    contribution[3:6, 3:6] = 1.0
    field = ReceptiveField({"contribution": contribution, "unit": np.array([4, 4])})
    assert field.area_ratio(1 / 9) == 1 / 81
    assert field.area_ratio(0.5) == field.area_ratio(1.0) == 9 / 81
    contribution[0, 0] = 1.0
    assert field.area_ratio(1.0) == 1
    with pytest.raises(ValueError, match=r"share must lie in \(0, 1\]: got 0"):
        field.area_ratio(0)


def test_networks_come_back_as_they_were():
    model = create_model("resnet_test", num_classes=3).train()
    field = receptive_field(model, torch.randn(2, 3, 32, 40))
    assert field.data["contribution"].shape == (32, 40)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert field.plot().axes


def test_what_is_no_map_is_refused():
    with pytest.raises(UsageError, match="gives no feature map"):
        receptive_field(nn.Flatten(), torch.randn(1, 3, 4, 4))
    with pytest.raises(UsageError, match="does not depend on the images"):
        receptive_field(torch.zeros_like, torch.randn(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"unit must lie within 4 x 4: got \(4, 0\)"):
        receptive_field(nn.Identity(), torch.randn(1, 3, 4, 4), unit=(4, 0))
