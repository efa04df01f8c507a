"""The small flow of the checks: exact inverse, exact density, learning."""

import pytest
import torch

from omniconv.layers.conv.finc import FInCUnit
from omniconv.layers.conv.inverse import InverseConv2d
from omniconv.papers.small_flow import Flow, Mix1x1, bits_per_dim, digit_counts, train_flow

MIXINGS = {
    "1x1": lambda c: [Mix1x1(c)],
    "inverse": lambda c: [InverseConv2d(c)],
    "finc": lambda c: [Mix1x1(c), FInCUnit(c)],
}


def _flow(name):
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        flow = Flow(MIXINGS[name], steps=2, width=8)
        for parameter in flow.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        for step in (step for level in flow.levels for step in level):
            step.fresh = False
        return flow
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", list(MIXINGS))
def test_the_density_is_that_of_the_change_of_variables(name):
    flow = _flow(name)

    def decode(z):
        return flow.decode(z[:, :32].reshape(1, 8, 2, 2), z[:, 32:].reshape(1, 2, 4, 4))

    latent = torch.randn(1, 64, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(decode, latent).reshape(64, 64)
    normal = torch.distributions.Normal(0, 1).log_prob(latent).sum()
    wanted = normal - torch.linalg.slogdet(jacobian)[1]
    torch.testing.assert_close(flow.log_prob(decode(latent))[0], wanted, rtol=1e-8, atol=1e-8)


def test_training_lowers_the_bits():
    train, test = digit_counts()
    assert train.shape == (1300, 1, 8, 8)
    bits = [bits_per_dim(train_flow(MIXINGS["1x1"], train, 0, steps), test, 2) for steps in (1, 30)]
    assert bits[1] < bits[0] - 0.2
