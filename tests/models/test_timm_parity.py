"""Every network that timm knows by the same name takes timm's state dict as it is and computes the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from omniconv.models.factory import create_model, get_variant, list_models
from tests.parity import (
    calibrate,
    fill,
    gap,
    images_for,
    import_timm,
    input_gradient,
    load_renamed,
    no_dropout,
    without_init,
)

TOLERANCE = 1e-4
SMALL = 30e6  # parameters up to which train mode and feature maps are compared too
GIANT = 350e6  # parameters from which a network is left to the slow tests

timm = import_timm() or pytest.skip("timm is not installed", allow_module_level=True)


def _parameters(name: str) -> float:
    published = get_variant(name).params
    return published or sum(p.numel() for p in create_model(name, device="meta").parameters())


def _names() -> list:
    names = sorted(set(list_models()) & set(timm.list_models()))
    return [
        pytest.param(name, marks=[pytest.mark.slow] if _parameters(name) > GIANT else []) for name in names
    ]


def _pair(name: str, images: torch.Tensor) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return ours and timm's network with the same telling weights, strictly loaded."""
    with without_init():
        theirs = timm.create_model(name, num_classes=1000)  # some have no classifier by default
        ours = create_model(name)
    no_dropout(ours)
    no_dropout(theirs)
    fill(theirs)
    calibrate(theirs, images)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def assert_agree(ours: torch.nn.Module, theirs: torch.nn.Module, images: torch.Tensor) -> None:
    """Compare in float32; a network that amplifies rounding beyond the tolerance by itself, in float64 as well.

    repvgg_d2se with random weights is such a network: the last bit of its input moves its output by a tenth.
    """
    expected = theirs(images)
    found = gap(ours(images), expected)
    if found <= TOLERANCE:
        return
    assert found <= gap(theirs(images * (1 + torch.finfo(torch.float32).eps)), expected)
    assert gap(ours.double()(images.double()), theirs.double()(images.double())) <= 1e-9
    ours.float()
    theirs.float()


def assert_equal(
    function: Callable[..., list[torch.Tensor]],
    ours: torch.nn.Module,
    theirs: torch.nn.Module,
    images: torch.Tensor,
) -> None:
    """Compare what a function makes of both networks in float32, or in float64 where rounding grows too large."""
    for dtype in (torch.float32, torch.float64):
        results = [function(model.to(dtype), images.to(dtype)) for model in (ours, theirs)]
        found = max(gap(our, their) for our, their in zip(*results, strict=True))
        if found <= TOLERANCE:
            break
    ours.float()
    theirs.float()
    assert found <= TOLERANCE


@pytest.mark.parametrize("name", _names())
@torch.no_grad()
def test_parity(name: str) -> None:
    images = images_for(name)
    ours, theirs = _pair(name, images)
    assert_agree(ours.eval(), theirs.eval(), images[:1])
    if sum(p.numel() for p in ours.parameters()) > SMALL:
        return
    assert_equal(lambda model, x: [input_gradient(model, x)], ours, theirs, images[:1])
    state = {key: value.clone() for key, value in theirs.state_dict().items()}
    assert_equal(lambda model, x: [model.train()(x)], ours, theirs, images)

    with without_init():
        reference: Any = timm.create_model(name, features_only=True).eval()
        extractor = create_model(name, features_only=True).eval()
    load_renamed(reference, state)
    load_renamed(extractor, {f"backbone.{key}": value for key, value in state.items()})
    assert extractor.feature_info.channels() == reference.feature_info.channels()
    assert extractor.feature_info.reduction() == reference.feature_info.reduction()
    assert_equal(lambda model, x: model(x), extractor, reference, images[:1])


@torch.no_grad()
def test_a_fault_in_any_parameter_shows() -> None:
    """The comparison is worth something only if no weight is hidden, by a scale near zero or behind others."""
    images = images_for("resnet50")
    ours, theirs = _pair("resnet50", images)
    expected = theirs.eval()(images[:1])
    for parameter in ours.eval().parameters():
        parameter.mul_(1.05)
        assert gap(ours(images[:1]), expected) > TOLERANCE
        parameter.div_(1.05)
