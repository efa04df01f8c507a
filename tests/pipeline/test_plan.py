import pytest
import torch

from omniconv.data.schema import Schema
from omniconv.models.factory import create_model
from omniconv.pipeline import plan
from omniconv.pipeline.config import FitConfig
from omniconv.pipeline.plan import Candidate, make_plan, needed_size


@pytest.mark.parametrize(
    ("name", "size"), [("convnext_tiny", 64), ("resnet18", 64), ("resnet_test", 16), ("osnet_test", 32)]
)
def test_small_pictures_are_enlarged_for_deep_networks(name, size):
    assert needed_size(name, 16) == size
    last = create_model(name, features_only=True, device="meta")(
        torch.empty(1, 3, size, size, device="meta")
    )[-1]
    assert min(last.shape[2:]) >= 2
    assert needed_size(name, 224) == 224


@pytest.mark.parametrize(
    ("asked", "epochs"), [({}, 60), ({"seconds": 100.0}, 100), ({"seconds": 1000.0}, 300), ({"epochs": 7}, 7)]
)
def test_a_time_that_was_asked_for_is_used(monkeypatch, asked, epochs):
    # An epoch of 1,000 pictures takes a second.
    cost = 1 / (1000 * plan.OVERHEAD)
    monkeypatch.setattr(plan, "measure", lambda name, size, *_: Candidate(name, size, cost, "float32", 1000))
    schema = Schema("classification", ("a", "b"), 1, 0.0, 16.0, 8, 8)
    config = FitConfig(data="digits", model="resnet_test", **asked)
    assert make_plan(schema, 1000, 2, config, device=torch.device("cpu")).epochs == epochs
