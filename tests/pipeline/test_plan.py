import pytest
import torch

from omniconv.models.factory import create_model
from omniconv.pipeline.plan import needed_size


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
