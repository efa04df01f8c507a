import pytest
import torch

from omniconv.layers.norm.grn import GlobalResponseNorm


def test_equation_channel_by_channel():
    layer = GlobalResponseNorm(5, eps=1e-4).double()
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    y = layer(x)
    for n in range(2):
        energy = [sum(float(v) ** 2 for v in x[n, c].flatten()) ** 0.5 for c in range(5)]
        for c in range(5):
            relative = energy[c] / (sum(energy) / 5 + 1e-4)
            expected = layer.weight[c] * (x[n, c] * relative) + layer.bias[c] + x[n, c]
            torch.testing.assert_close(y[n, c], expected)


def test_starts_as_the_identity():
    x = torch.randn(2, 6, 4, 4)
    assert torch.equal(GlobalResponseNorm(6)(x), x)


@pytest.mark.parametrize("shape", [(2, 6, 9), (2, 6, 5, 4), (1, 6, 3, 4, 2)])
def test_both_layouts_of_signals_images_and_volumes_agree(shape):
    first, last = GlobalResponseNorm(6), GlobalResponseNorm(6, channels_last=True)
    torch.nn.init.normal_(first.weight)
    torch.nn.init.normal_(first.bias)
    last.load_state_dict(first.state_dict())
    x = torch.randn(shape)
    torch.testing.assert_close(last(x.movedim(1, -1)).movedim(-1, 1), first(x))


def test_a_map_of_zeros_has_finite_gradients():
    layer = GlobalResponseNorm(3)
    torch.nn.init.ones_(layer.weight)
    x = torch.zeros(1, 3, 4, 4, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
