"""The search over places of instance norms: mixtures are what they say, and a planted best choice is found."""

import torch

from omniconv.design.nas.osnet import MixedOSBlock, SearchOSNet, search_places
from omniconv.models.image.osnet import PLACES, OSNetConfig

TINY = OSNetConfig((8, 16, 16), (("none", "none"), ("none",)), streams=1, feature_dim=8)


def test_a_cold_mixture_is_its_strongest_candidate():
    torch.manual_seed(0)
    block = MixedOSBlock(8, 16, 1).double().eval()
    block.temperature = 1e-3
    x = torch.randn(2, 8, 6, 5, dtype=torch.float64)
    for index, place in enumerate(PLACES):
        with torch.no_grad():
            block.weights.zero_()[index] = 1.0
        torch.testing.assert_close(block(x), block.candidates[index](x))
        assert block.place() == place


def test_a_hot_mixture_is_the_mean():
    torch.manual_seed(0)
    block = MixedOSBlock(8, 8, 1).double().eval()
    block.temperature = 1e9
    x = torch.randn(2, 8, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(
        block(x), torch.stack([f(x) for f in block.candidates]).mean(0), rtol=1e-6, atol=1e-6
    )


def test_the_first_batch_moves_the_weights_and_the_second_the_choices():
    torch.manual_seed(0)
    batch = torch.randn(4, 3, 32, 16), torch.tensor([0, 1, 0, 1])
    other = torch.randn(4, 3, 32, 16), torch.tensor([1, 1, 0, 0])
    for lr, choice_lr in ((0.0, 0.1), (0.01, 0.0)):
        network = SearchOSNet(TINY, 2)
        before = {name: value.clone() for name, value in network.named_parameters()}
        found = search_places(network, [(batch, other)] * 9, 3, lr=lr, choice_lr=choice_lr)
        assert found.widths == TINY.widths
        assert found.places == network.found().places
        for name, value in network.named_parameters():
            choice = "candidates" not in name and name.endswith(".weights")
            if (choice_lr if choice else lr) == 0:
                assert torch.equal(value, before[name]), name
        moved = [not torch.equal(value, before[name]) for name, value in network.named_parameters()]
        assert sum(moved) >= (3 if choice_lr else 100)
        assert all(abs(mixture.temperature - 1) < 1e-9 for mixture in network.mixtures())
