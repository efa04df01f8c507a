import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from omniconv.compress.prune.saliency import grasp_scores, snip_scores, synflow_masks, synflow_scores

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()
Y = torch.arange(16) % 10


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.Tanh(),
        nn.Conv2d(8, 16, 3),
        nn.Flatten(),
        nn.Linear(256, 10),
    ).double()


def loss(model: nn.Module) -> torch.Tensor:
    return F.cross_entropy(model(X), Y)


def test_snip_scores_are_the_derivative_by_a_gate():
    model = network()
    scores = snip_scores(model, loss)
    before = model.state_dict()["1.running_mean"].clone()
    for layer, index in (("0", (2, 1, 0, 2)), ("3", (4, 5, 1, 1)), ("5", (7, 100))):
        values = []
        for gate in (1 + 1e-5, 1 - 1e-5):
            twin = network()
            with torch.no_grad():
                twin.get_submodule(layer).weight[index] *= gate
                values.append(float(loss(twin)))
        numeric = abs(values[0] - values[1]) / 2e-5
        assert float(scores[layer][index]) == pytest.approx(numeric, rel=1e-3, abs=1e-8)
    assert torch.equal(model.state_dict()["1.running_mean"], before)


def test_grasp_scores_are_the_change_of_the_gradient_along_itself():
    model = network()
    scores = grasp_scores(model, loss)
    layers = list(scores)

    def gradients(step: float, along: list[torch.Tensor]) -> list[torch.Tensor]:
        twin = copy.deepcopy(model)
        weights = [twin.get_submodule(name).weight for name in layers]
        with torch.no_grad():
            for weight, direction in zip(weights, along, strict=True):
                weight += step * direction
        return list(torch.autograd.grad(loss(twin), weights))

    zero = [torch.zeros_like(model.get_submodule(name).weight) for name in layers]
    along = gradients(0.0, zero)
    for name, up, down in zip(layers, gradients(1e-4, along), gradients(-1e-4, along), strict=True):
        expected = model.get_submodule(name).weight.detach() * (up - down) / 2e-4
        torch.testing.assert_close(scores[name].double(), expected, rtol=1e-3, atol=1e-7)


def test_synflow_scores_of_a_chain_by_hand():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7, bias=False), nn.ReLU(), nn.Linear(7, 3, bias=False))
    first, last = (model[i].weight.detach().double().abs() for i in (0, 2))
    scores = synflow_scores(model, (5,))
    # What enters a weight, times the weight, times what its output is worth.
    torch.testing.assert_close(scores["0"], first * last.sum(0)[:, None])
    torch.testing.assert_close(scores["2"], last * first.sum(1))
    # Flow is conserved: the same sum in every layer.
    assert float(scores["0"].sum()) == pytest.approx(float(scores["2"].sum()))
    assert model[0].weight.min() < 0


def test_synflow_masks_are_exact_and_no_layer_collapses():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 90), nn.ReLU(), nn.Linear(90, 90), nn.ReLU(), nn.Linear(90, 2))
    with torch.no_grad():
        model[4].weight.mul_(1e-3)
    masks = synflow_masks(model, 0.99, (10,), rounds=20)
    total = 10 * 90 + 90 * 90 + 180
    counts = [int(mask.sum()) for mask in masks.values()]
    assert sum(counts) == total - round(0.99 * total)
    assert min(counts) > 0
