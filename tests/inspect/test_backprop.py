"""The three backward rules against a recursion written out by hand."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from omniconv.core.errors import UsageError
from omniconv.inspect.backprop import backpropagate


@pytest.fixture
def network():
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(2, 6, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, 3),
        nn.ReLU(),
        nn.Flatten(),
    ]
    return nn.Sequential(*layers, nn.Linear(8 * 5 * 4, 3))


@pytest.fixture
def images():
    return torch.randn(4, 2, 7, 6, generator=torch.Generator().manual_seed(1))


def by_hand(network, x, classes, rule):
    """Return the signal at the pixels, and where each ReLU was inactive with the signal that left it."""
    first, _, second, _, _, last = network
    a = F.conv2d(x, first.weight, first.bias, padding=1)
    b = F.conv2d(a.relu(), second.weight, second.bias)
    signal = last.weight[classes].view(b.shape)
    left = []
    for before, conv, padding in ((b, second, 0), (a, first, 1)):
        if rule in ("guided", "gradient"):
            signal = signal * (before > 0)
        if rule in ("guided", "deconvnet"):
            signal = signal * (signal > 0)
        left.append(signal[before <= 0])
        signal = F.conv_transpose2d(signal, conv.weight, padding=padding)
    return signal, torch.cat(left)


@pytest.mark.parametrize("rule", ["gradient", "deconvnet", "guided"])
def test_rules_are_the_recursion(network, images, rule):
    classes = torch.tensor([2, 0, 1, 1])
    picture = backpropagate(network, images, classes, rule=rule)
    with torch.no_grad():
        expected, inactive = by_hand(network, images, classes, rule)
    np.testing.assert_allclose(picture.data["gradient"], expected, atol=1e-6)
    assert (inactive == 0).all() == (rule != "deconvnet")
    assert picture.data["target"].tolist() == classes.tolist()


def test_the_plain_rule_is_autograd_and_the_model_stays(network, images):
    network.train().requires_grad_(False)
    picture = backpropagate(network, images, rule="gradient")
    x = images.clone().requires_grad_()
    (expected,) = torch.autograd.grad(network(x).amax(1).sum(), x)
    np.testing.assert_allclose(picture.data["gradient"], expected, atol=1e-6)
    assert network.training
    assert all(p.grad is None and not p.requires_grad for p in network.parameters())


def test_relus_that_are_functions_count_and_inplace_ones_change_no_image(images):
    class Function(nn.Module):
        def forward(self, x):
            return F.relu(-F.relu(x) + 1).relu().flatten(1)

    kept = images.clone()
    picture = backpropagate(Function(), images, lambda y: y.sum(1), rule="guided")
    assert (picture.data["gradient"] == 0).all(), "the inner signal is negative everywhere"
    assert (
        backpropagate(Function(), images, lambda y: y.sum(1), rule="gradient").data["gradient"] != 0
    ).any()
    assert "target" not in picture.data
    backpropagate(nn.Sequential(nn.ReLU(inplace=True), nn.Flatten()), images)
    assert torch.equal(images, kept)


def test_pictures_are_saved(network, images, tmp_path):
    picture = backpropagate(network, images)
    for name in ("x.png", "x.html", "x.npz"):
        picture.save(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 500


def test_what_cannot_be_done_is_said(images):
    smooth = nn.Sequential(nn.GELU(), nn.Flatten())
    with pytest.raises(UsageError, match="Sequential has no ReLU for rule='guided'; use rule='gradient'"):
        backpropagate(smooth, images)
    backpropagate(smooth, images, rule="gradient")
    with pytest.raises(UsageError, match="the score does not depend on the images; give another target"):
        backpropagate(smooth, images, lambda y: y.detach().sum(1), rule="gradient")
    with pytest.raises(ValueError, match=r"rule must be one of .* got 'gided'; did you mean guided?"):
        backpropagate(smooth, images, rule="gided")
    with pytest.raises(
        ValueError, match=r"x must be a batch of images \(N, C, H, W\): got shape \(2, 7, 6\)"
    ):
        backpropagate(smooth, images[0])
