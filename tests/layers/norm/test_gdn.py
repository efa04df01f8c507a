import pytest
import torch

from omniconv.layers.norm.gdn import GeneralizedDivisiveNorm


@pytest.mark.parametrize("simplified", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 3, 2, 4)])
def test_equation_channel_by_channel(simplified, shape):
    layer = GeneralizedDivisiveNorm(3, simplified=simplified).double().requires_grad_(False)
    torch.nn.init.normal_(layer.gamma)
    torch.nn.init.normal_(layer.beta)
    x = torch.randn(shape, dtype=torch.float64)
    y = layer(x)
    for i in range(3):
        pool = float(layer.beta[i]) ** 2 + 1e-6
        for j in range(3):
            energy = x[:, j].abs() if simplified else x[:, j] ** 2
            pool = pool + float(layer.gamma[i, j]) ** 2 * energy
        torch.testing.assert_close(y[:, i], x[:, i] / (pool if simplified else pool**0.5))


def test_inverse_multiplies_by_the_same_pool():
    forward, inverse = GeneralizedDivisiveNorm(4), GeneralizedDivisiveNorm(4, inverse=True)
    inverse.load_state_dict(forward.state_dict())
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(forward(x) * inverse(x), x * x)


def test_its_output_is_bounded():
    layer = GeneralizedDivisiveNorm(2)
    # x / sqrt(1 + 0.1 x^2) stays below 1 / sqrt(0.1).
    assert layer(torch.full((1, 2, 1, 1), 1e6)).abs().max() <= 10**0.5
