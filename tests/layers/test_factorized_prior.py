import pytest
import torch

from omniconv.layers.factorized_prior import FactorizedPrior


def make(channels=3):
    torch.manual_seed(0)
    prior = FactorizedPrior(channels, init_scale=2.0).eval()
    for factor in prior.factors:
        torch.nn.init.normal_(factor)
    prior.update()
    return prior


def test_bits_are_those_of_a_difference_of_sigmoids():
    prior = make().double()
    y = torch.randn(2, 3, 5, dtype=torch.float64) * 2

    def cumulative(u):
        for k in range(4):
            u = torch.nn.functional.softplus(prior.matrices[k]) @ u + prior.biases[k]
            if k < 3:
                u = u + torch.tanh(prior.factors[k]) * torch.tanh(u)
        return torch.sigmoid(u)

    flat = y.transpose(0, 1).reshape(3, 1, -1)
    mass = cumulative(flat + 0.5) - cumulative(flat - 0.5)
    torch.testing.assert_close(prior.bits(y), -mass.log2().reshape(3, 2, 5).transpose(0, 1))


def test_far_values_have_finite_bits_that_pull_back():
    prior = make()
    y = torch.tensor([-3e4, -500.0, 500.0, 3e4]).expand(1, 3, 4).clone().requires_grad_()
    prior.bits(y).sum().backward()
    assert y.grad is not None
    assert (y.grad.sign() == y.detach().sign()).all()


def test_masses_sum_to_one():
    integers = torch.arange(-2000, 2001).double().expand(1, 3, -1)
    torch.testing.assert_close(torch.exp2(-make().bits(integers)).sum(2), torch.ones(1, 3).double())


def test_bytes_are_as_many_as_the_bits_say():
    prior = make()
    y = torch.randn(2, 3, 40, 30) * 3
    y[0, 0, 0, 0], y[1, 2, 3, 4] = 1e6, -777.0
    messages = prior.compress(y)
    torch.testing.assert_close(prior.decompress(messages, (40, 30)), y.round(), rtol=0, atol=0)
    clipped = y.clamp(-100, 100)
    for message, bits in zip(prior.compress(clipped), prior(clipped).flatten(1).sum(1).tolist(), strict=True):
        assert abs(len(message) - bits / 8) <= 0.02 * bits / 8 + 16


def test_training_adds_noise_of_half_a_step():
    prior = make().train()
    y = torch.zeros(1, 3, 1000)
    noise = prior.quantise(y)
    assert noise.abs().max() <= 0.5
    assert noise.var().sub(1 / 12).abs() < 0.01


def test_what_cannot_be_coded_is_refused():
    with pytest.raises(ValueError, match="call update"):
        FactorizedPrior(3).compress(torch.zeros(1, 3, 2))
    with pytest.raises(ValueError, match="must be finite"):
        make().compress(torch.full((1, 3, 2), float("nan")))
    with pytest.raises(ValueError, match="fit into 32 bits"):
        make().compress(torch.full((1, 3, 2), 1e10))


def test_frequencies_belong_to_the_state():
    prior = make()
    other = FactorizedPrior(3)
    other.load_state_dict(prior.state_dict())
    y = torch.randn(1, 3, 7, 5) * 2
    assert torch.equal(other.decompress(prior.compress(y), (7, 5)), y.round())
