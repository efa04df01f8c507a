"""EvoNorm against the paper's formulae in NumPy, and against timm."""

import numpy as np
import pytest
import torch

from omniconv.layers.norm import evonorm
from tests.parity import import_timm

EPS = 1e-5


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def reference(name, x, v, groups=4):
    """The paper's table of layers, in float64, before the affine end."""
    batch = np.sqrt(x.var((0, 2, 3), keepdims=True) + EPS)
    rms = np.sqrt((x**2).mean((2, 3), keepdims=True) + EPS)
    grouped = x.reshape(len(x), groups, -1)
    group_std = np.sqrt(grouped.var(2) + EPS).repeat(x.shape[1] // groups, 1)[:, :, None, None]
    group_rms = np.sqrt((grouped**2).mean(2) + EPS).repeat(x.shape[1] // groups, 1)[:, :, None, None]
    return {
        "B0": lambda: x / np.maximum(batch, v * x + np.sqrt(x.var((2, 3), keepdims=True) + EPS)),
        "B1": lambda: x / np.maximum(batch, (x + 1) * rms),
        "B2": lambda: x / np.maximum(batch, rms - x),
        "S0": lambda: x * sigmoid(v * x) / group_std,
        "S1": lambda: x * sigmoid(x) / group_std,
        "S2": lambda: x * sigmoid(x) / group_rms,
    }[name]()


def make(name, channels=8):
    layer = getattr(evonorm, f"EvoNorm{name}")
    layer = layer(channels) if name.startswith("B") else layer(channels, 4)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer.double()


@pytest.mark.parametrize("name", ["B0", "B1", "B2", "S0", "S1", "S2"])
def test_members_are_the_formulae_of_the_paper(name):
    torch.manual_seed(0)
    layer, x = make(name), 3 * torch.randn(3, 8, 5, 4, dtype=torch.float64) + 1
    weight, bias, v = (
        p.detach().numpy()[:, None, None] for p in (layer.weight, layer.bias, getattr(layer, "v", layer.bias))
    )
    expected = reference(name, x.numpy(), v) * weight + bias
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, atol=1e-9)


def test_the_moving_average_is_that_of_the_batches():
    layer = evonorm.EvoNormB0(2, momentum=0.25)
    x = torch.randn(4, 2, 6, 6)
    layer(x)
    torch.testing.assert_close(layer.running_var, 0.75 + 0.25 * x.var((0, 2, 3), correction=0))
    kept = layer.running_var.clone()
    layer.eval()(x)
    assert torch.equal(layer.running_var, kept)


@pytest.mark.parametrize(("name", "alone"), [("B0", False), ("S0", True)])
def test_the_s_series_alone_sees_no_other_sample_in_training(name, alone):
    layer, x = make(name), torch.randn(4, 8, 5, 4, dtype=torch.float64)
    same = torch.allclose(layer(x)[:1], layer(x[:1]), atol=1e-7)
    assert same == alone
    layer.eval()
    torch.testing.assert_close(layer(x)[:1], layer(x[:1]))


@pytest.mark.parametrize("name", ["B0", "S0"])
def test_without_activation_only_the_affine_end_is_left(name):
    layer = getattr(evonorm, f"EvoNorm{name}")(32, act=False)
    assert set(dict(layer.named_parameters())) == {"weight", "bias"}
    x = torch.randn(2, 32, 3, 3)
    assert torch.equal(layer(x), x)


@pytest.mark.parametrize("name", ["B0", "B1", "B2", "S0", "S1", "S2"])
@pytest.mark.parametrize("training", [True, False])
def test_timm_computes_the_same(name, training):
    if import_timm() is None:
        pytest.skip("timm is not installed")
    from timm.layers import evo_norm

    options = {} if name.startswith("B") else {"groups": 4}
    theirs = getattr(evo_norm, f"EvoNorm2d{name}")(8, eps=EPS, **options).train(training)
    ours = make(name).float().train(training)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 8, 6, 5)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
