"""Gates of channels and pixels against loops."""

import math

import pytest
import torch

from omniconv.layers.attention.scse import CSE, SCSE, SSE, insert_gates


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def test_the_pixel_gate_is_a_dot_product_at_every_pixel():
    layer, x = SSE(5).double(), torch.randn(2, 5, 3, 4, dtype=torch.float64)
    y = layer(x)
    for n in range(2):
        for i in range(3):
            for j in range(4):
                score = sum(w * u for w, u in zip(layer.weight.tolist(), x[n, :, i, j].tolist(), strict=True))
                expected = x[n, :, i, j] * sigmoid(score + layer.bias.item())
                torch.testing.assert_close(y[n, :, i, j], expected)


def test_the_channel_gate_is_a_bottleneck_of_means():
    layer, x = CSE(6, 3).double(), torch.randn(2, 6, 3, 4, dtype=torch.float64)
    means = x.flatten(2).sum(2) / 12
    hidden = (means @ layer.fc1.weight.T + layer.fc1.bias).clamp(min=0)
    gates = 1 / (1 + torch.exp(-(hidden @ layer.fc2.weight.T + layer.fc2.bias)))
    torch.testing.assert_close(layer(x), x * gates[:, :, None, None])


@pytest.mark.parametrize("merge", ["max", "add", "product", "concat"])
def test_merges(merge):
    layer, x = SCSE(4, merge=merge), torch.randn(2, 4, 3, 5, 2)
    a, b = layer.cse(x), layer.sse(x)
    expected = {
        "max": torch.where(a > b, a, b),
        "add": a + b,
        "product": a * b,
        "concat": torch.cat((a, b), 1),
    }[merge]
    torch.testing.assert_close(layer(x), expected)


def test_gates_are_put_behind_the_named_blocks():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1))
    gated = insert_gates(model, torch.zeros(1, 3, 5, 5), ["0", "2"])
    kinds = [(type(m).__name__, m.weight.numel()) for m in gated.modules() if isinstance(m, SSE)]
    assert kinds == [("SSE", 8), ("SSE", 4)]
    assert not any(isinstance(m, SCSE) for m in model.modules())
    assert not any(m._forward_hooks for m in (*model.modules(), *gated.modules()))
    x = torch.randn(2, 3, 5, 5)
    expected = gated[2][1](model[2](gated[0][1](model[0](x)).relu()))
    torch.testing.assert_close(gated(x), expected)
