"""Segmenter: every token is classified on its own, and painted where its patch is."""

import pytest
import torch
from torch.nn import functional as F

from omniconv.models.dense.segmenter import Segmenter
from omniconv.models.factory import create_model


@pytest.mark.parametrize("name", ["vit_test", "deit_test", "convit_test"])
def test_every_pixel_of_an_odd_image_gets_scores_and_every_parameter_a_gradient(name):
    model = Segmenter(create_model(name), 3)
    scores = model(torch.randn(2, 3, 37, 50))
    assert scores.shape == (2, 3, 37, 50)
    scores.square().sum().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None]
    assert idle == []


@torch.no_grad()
def test_it_is_a_linear_layer_at_every_patch():
    torch.manual_seed(0)
    model = Segmenter(create_model("deit_test"), 5).eval()
    x = torch.randn(2, 3, 48, 40)
    tokens = model.encoder.forward_features(x)[:, :, 2:].unflatten(2, (6, 5))
    maps = F.conv2d(tokens, model.head.weight[:, :, None, None], model.head.bias)
    wanted = F.interpolate(maps, size=(48, 40), mode="bilinear")
    torch.testing.assert_close(model(x), wanted)
