"""Polyphase anchoring against a loop, and its promise: shifts of the image shift patches as wholes."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from omniconv.layers.attention.polyphase_anchor import AnchoredConv2d, polyphase_anchor, roll_each
from omniconv.models.factory import create_model


def same_up_to_a_roll(a: torch.Tensor, b: torch.Tensor) -> bool:
    return any(
        torch.allclose(a, torch.roll(b, shift, (2, 3)))
        for shift in itertools.product(range(a.shape[2]), range(a.shape[3]))
    )


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_the_component_of_the_largest_norm_comes_onto_the_grid(p):
    torch.manual_seed(0)
    x = torch.randn(3, 2, 6, 9, dtype=torch.float64)
    rolled, shift = polyphase_anchor(x, 3, p)
    for sample, (dy, dx) in zip(x, shift.tolist(), strict=True):
        norms = {(i, j): float((sample[:, i::3, j::3].abs() ** p).sum()) for i in range(3) for j in range(3)}
        assert (dy, dx) == max(norms, key=norms.__getitem__)
    assert torch.equal(rolled[1], torch.roll(x[1], (-int(shift[1, 0]), -int(shift[1, 1])), (1, 2)))
    assert torch.equal(roll_each(rolled, -shift), x)


def test_of_equal_components_the_first_counts():
    x = torch.ones(1, 1, 4, 4)
    assert polyphase_anchor(x, 2)[1].tolist() == [[0, 0]]


def test_patches_follow_the_image():
    torch.manual_seed(0)
    conv = AnchoredConv2d(2, 4, 3).double()
    x = torch.randn(1, 2, 9, 6, dtype=torch.float64)
    plain = F.conv2d(x, conv.weight, conv.bias, 3)
    for shift in itertools.product(range(4), range(3)):
        shifted = torch.roll(x, shift, (2, 3))
        assert same_up_to_a_roll(conv(x), conv(shifted))
    assert not same_up_to_a_roll(plain, F.conv2d(torch.roll(x, 1, 3), conv.weight, conv.bias, 3))


def test_maps_that_the_stride_does_not_divide_are_completed():
    x = torch.randn(2, 1, 4, 5)
    full = torch.zeros(2, 1, 6, 6)
    full[:, :, :4, :5] = x
    rolled, shift = polyphase_anchor(x, 3)
    assert torch.equal(roll_each(rolled, -shift), full)


@pytest.mark.parametrize(
    ("name", "more"), [("vit_test", {}), ("deit_test", {"patch_size": 4}), ("twins_test", {"window": 2})]
)
@torch.no_grad()
def test_anchored_networks_answer_the_same_wherever_the_image_is_shifted(name, more):
    torch.manual_seed(0)
    model = create_model(name, num_classes=3, anchored=True, **more).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(1, 3, 32, 48, dtype=torch.float64)
    shifts = [(0, 0), (1, 0), (3, 5), (7, 2)]
    images = torch.cat([torch.roll(x, shift, (2, 3)) for shift in shifts])
    logits = model(images)
    assert logits.abs().max() > 1e-2
    torch.testing.assert_close(logits, logits[:1].expand_as(logits))
    last = model.forward_stages(images)[-1]
    assert all(same_up_to_a_roll(last[:1], last[i : i + 1]) for i in range(len(shifts)))
