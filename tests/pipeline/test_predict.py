"""A trained network with everything around it."""

import pytest
import torch

import omniconv
from omniconv.data.preprocess import Preprocess
from omniconv.pipeline.predict import Predictor
from omniconv.tasks.factory import make_task


@pytest.mark.parametrize("name", ["deit_test", "cvt_test", "convnext_test"])
def test_activation_maps_show_something_with_and_without_class_token(name):
    torch.manual_seed(0)
    model = omniconv.create_model(name, num_classes=3)
    preprocess = Preprocess(64, [0.5] * 3, [0.25] * 3)
    predictor = Predictor(model, preprocess, make_task("classification", ("a", "b", "c")), 3, "run")
    maps = predictor.activation_maps(torch.randint(256, (2, 3, 50, 70), dtype=torch.uint8))
    assert maps.shape == (2, 50, 70)
    assert (maps.std((1, 2)) > 0.01).all()
