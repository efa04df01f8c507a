import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from omniconv.compress.prune.activate_while_pruning import activate_while_pruning, dead_neurons
from omniconv.compress.prune.global_magnitude import magnitudes
from omniconv.compress.prune.masks import prunable_weights

X = torch.randn(8, 3, 8, 7, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """ReLUs as a module, a function, a method and in place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.conv2, self.act = nn.Conv2d(8, 6, 3, bias=False), nn.ReLU()
        self.fc1, self.fc2, self.fc3 = nn.Linear(6, 20), nn.Linear(20, 10), nn.Linear(10, 3)

    def activations(self, x):
        first = F.relu(self.bn(self.conv1(x)), inplace=True)
        second = self.act(self.conv2(first))
        third = self.fc1(second.mean((2, 3))).relu()
        return first, second, third, torch.relu_(self.fc2(third))

    def forward(self, x):
        return self.fc3(self.activations(x)[-1])


def test_dead_neurons_are_the_zeros_of_stored_activations():
    model = Net().train()
    with torch.no_grad():
        model.conv1.weight[[0, 3]] = 0
        # A bias above zero keeps a neuron without weights alive.
        model.bn.bias[[0, 3]] = torch.tensor([1.0, -1.0])
        model.conv2.weight[5] = 0
        model.fc1.weight[2:4] = 0
        model.fc1.bias[2:4] = -0.1
    state = copy.deepcopy(model.state_dict())
    measured = dead_neurons(model, X.split(3))
    assert model.training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    total = dead = static = 0
    unfed = ([0, 3], [5], [2, 3], [])
    for sample in X:
        for maps, without in zip(model.eval().activations(sample[None]), unfed, strict=True):
            for channel in range(maps.shape[1]):
                for value in maps[0, channel].flatten().tolist():
                    total += 1
                    dead += value == 0
                    static += value == 0 and channel in without
    assert measured.static == pytest.approx(static / total)
    assert measured.dynamic == pytest.approx((dead - static) / total)
    assert measured.total == pytest.approx(dead / total)
    assert 0 < static < dead


def test_no_relu():
    with pytest.raises(ValueError, match="the model has no ReLU"):
        dead_neurons(nn.Linear(3, 3), [torch.randn(2, 3)])


def test_a_cycle_takes_the_smallest_and_then_the_least_moved_negative_weights():
    model = Net()
    reference = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for weight in prunable_weights(model).values():
            weight += 0.05 * torch.randn_like(weight)
    masks = {name: torch.ones_like(value, dtype=torch.bool) for name, value in magnitudes(model).items()}
    choose = activate_while_pruning(reference, 0.2, 0.05)
    for _ in range(3):
        left = sum(int(mask.sum()) for mask in masks.values())
        kept = choose(model, masks)
        assert left - sum(int(mask.sum()) for mask in kept.values()) == round(0.2 * left)
        # The same by sorting lists.
        weights = [
            (name, i, float(w), float(r))
            for name, weight in prunable_weights(model).items()
            for i, (w, r, m) in enumerate(
                zip(
                    weight.detach().flatten(),
                    reference[f"{name}.weight"].flatten(),
                    masks[name].flatten(),
                    strict=True,
                )
            )
            if m
        ]
        host = round(0.2 * left) - round(0.05 * left)
        weights = sorted(weights, key=lambda entry: abs(entry[2]))
        gone = weights[:host]
        negative = [entry for entry in weights[host:] if entry[2] < 0]
        gone += sorted(negative, key=lambda entry: abs(entry[2] - entry[3]))[: round(0.05 * left)]
        expected = {(name, i) for name, i, _, _ in gone}
        found = {
            (name, i)
            for name, mask in masks.items()
            for i in (mask & ~kept[name]).flatten().nonzero().flatten().tolist()
        }
        assert found == expected
        masks = kept


def test_without_negative_weights_the_host_takes_all():
    model = nn.Linear(10, 10)
    with torch.no_grad():
        model.weight.abs_()
    net = nn.Sequential(model)
    masks = {"0": torch.ones(10, 10, dtype=torch.bool)}
    kept = activate_while_pruning(copy.deepcopy(net.state_dict()), 0.2, 0.1)(net, masks)
    assert int(kept["0"].sum()) == 80
    assert model.weight[kept["0"]].min() >= model.weight[~kept["0"]].max()


def test_share_above_rate():
    with pytest.raises(ValueError, match=r"share must lie between 0 and rate, below 1: got 0\.3 and 0\.2"):
        activate_while_pruning({}, 0.2, 0.3)
