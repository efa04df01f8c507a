"""Vision transformers against timm's at other sizes, and positions against their definition."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from omniconv.models.factory import create_model
from omniconv.models.image.vit import OFFICIAL_NAMES, resample_positions
from omniconv.models.weights import adapt
from tests.parity import fill, gap, import_timm

SMALL: dict[str, Any] = {"dim": 48, "depth": 2, "num_heads": 3}


def pair(name: str):
    timm = import_timm() or pytest.skip("timm is not installed")
    theirs = timm.create_model(name, dynamic_img_size=True, embed_dim=48, depth=2, num_heads=3).eval()
    fill(theirs)
    ours = create_model(name, **SMALL).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "deit3_small_patch16_224", "deit_tiny_distilled_patch16_224"]
)
@torch.no_grad()
def test_positions_of_other_sizes_are_those_of_timm(name):
    ours, theirs = pair(name)
    for size in ((48, 80), (272, 240)):
        images = torch.randn(2, 3, *size)
        assert gap(ours(images), theirs(images)) < 1e-5


@torch.no_grad()
def test_tokens_behind_the_last_norm_are_those_of_timm():
    ours, theirs = pair("vit_tiny_patch16_224")
    images = torch.randn(1, 3, 64, 64)
    assert gap(ours.forward_features(images).mT, theirs.forward_features(images)) < 1e-5


def test_positions_of_the_trained_size_are_untouched():
    places = torch.randn(1, 3, 4, 5)
    assert resample_positions(places, 3, 4) is places


@pytest.mark.parametrize("size", [(7, 9), (2, 3), (3, 8)])
def test_positions_are_resampled_as_torch_does_with_antialiasing(size):
    places = torch.randn(1, 3, 4, 5, dtype=torch.float64)
    expected = F.interpolate(places.permute(0, 3, 1, 2), size, mode="bicubic", antialias=True)
    torch.testing.assert_close(resample_positions(places, *size), expected.permute(0, 2, 3, 1))


def test_a_constant_stays_constant_when_resampled():
    places = torch.full((1, 3, 4, 2), 0.75, dtype=torch.bfloat16)
    assert torch.equal(resample_positions(places, 7, 5), torch.full((1, 7, 5, 2), 0.75, dtype=torch.bfloat16))


def test_the_distilled_answer_is_the_mean_of_both_classifiers():
    model = create_model("deit_test", num_classes=3).eval()
    x = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        tokens = model.forward_features(x)
        head: Any = model.get_classifier()
        dist = head.dist
        class_token = F.linear(tokens[:, :, 0], head.weight, head.bias)
        expected = (class_token + dist(tokens[:, :, 1])) / 2
        torch.testing.assert_close(model(x), expected)


def test_public_weights_of_a_distilled_network_fit_other_classes():
    model = create_model("deit_test", num_classes=3)
    state = create_model("deit_test", num_classes=7).state_dict()
    official = {name.replace("head.dist.", "head_dist."): tensor for name, tensor in state.items()}
    adapted = adapt(model, official, OFFICIAL_NAMES)
    assert torch.equal(adapted["pos_embed"], state["pos_embed"])
    assert adapted["head.dist.weight"].shape == (3, 32)


@torch.no_grad()
def test_images_smaller_than_a_patch_are_padded():
    model = create_model("vit_tiny_patch16_224", **SMALL, num_classes=2).eval()
    assert model(torch.randn(1, 3, 9, 5)).shape == (1, 2)
    assert model.forward_stages(torch.randn(1, 3, 28, 28))[-1].shape == (1, 48, 2, 2)


def test_a_distillation_token_needs_a_class_token():
    with pytest.raises(ValueError, match="distilled needs the class token: leave class_token on"):
        create_model("deit_test", class_token=False)
