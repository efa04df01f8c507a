"""Relevance is conserved and equals the rule written as loops; the units that nobody needs go first."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import omniconv
from omniconv.compress.prune.lrp_prune import choose_stepwise, lrp_pruning, lrp_scores
from omniconv.compress.prune.relevance import RelevanceRules, relevance
from omniconv.compress.prune.structured import unit_norms
from omniconv.compress.structure.graph import trace_structure
from omniconv.testing.harness import randomize, seeded


class Residual(nn.Module):
    """A sum, batch norms, an in-place ReLU, a concatenation and both poolings, without biases."""

    def __init__(self, norm=True):
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.first = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.second = nn.Conv2d(6, 6, 3, padding=1, groups=2, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(12, 3, bias=False)

    def block(self, x):
        y = self.second(self.relu(self.first(x)))
        y += x
        return self.relu(y)

    def features(self, x):
        return self.relu(self.norm(self.stem(x)))

    def forward(self, x):
        x = self.block(F.max_pool2d(self.features(x), 2))
        x = torch.cat([x, F.avg_pool2d(x, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)], 1)
        return self.head(x.mean((2, 3)))


def made(norm=True):
    with seeded():
        model = randomize(Residual(norm)).eval()
        return model, torch.randn(4, 2, 8, 12), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_relevance_of_a_layer_equals_the_rule_in_loops(beta):
    with seeded():
        weight, x = torch.randn(3, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    layer = nn.Linear(5, 3, bias=True).double()
    layer.weight.data = weight
    labels = torch.tensor([2, 0, 1, 1])
    found, weights = relevance(layer, x, labels, beta=beta)
    wanted, flowed = torch.zeros_like(x), torch.zeros_like(weight)
    for n, j in enumerate(labels.tolist()):
        terms = [float(weight[j, i] * x[n, i]) for i in range(5)]
        up, down = sum(t for t in terms if t > 0), sum(t for t in terms if t < 0)
        for i, t in enumerate(terms):
            share = (1 + beta) * t / up if t > 0 else -beta * t / down
            wanted[n, i] = share * layer(x)[n, j].item()
            flowed[j, i] += wanted[n, i] * layer(x)[n, j].sign().item()
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(weights["weight"], flowed)


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_relevance_is_conserved(beta):
    """Total relevance at the input, and through every layer that all of it passes, is the score."""
    model, x, labels = made(norm=False)
    score = model(x).gather(1, labels[:, None]).squeeze(1)
    found, weights = relevance(model, x, labels, beta=beta)
    if not beta:
        torch.testing.assert_close(found.sum((1, 2, 3)), score, rtol=1e-4, atol=1e-5)
    for name in ("stem", "head"):
        torch.testing.assert_close(weights[f"{name}.weight"].sum(), score.abs().sum(), rtol=1e-4, atol=1e-5)


def test_a_batch_norm_is_folded():
    """The relevance is that of the network whose norms are folded by hand."""
    model, x, labels = made()
    folded = copy.deepcopy(model)
    scale = model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt()
    folded.stem = nn.Conv2d(2, 6, 3, padding=1)
    folded.stem.weight.data = (model.stem.weight * scale[:, None, None, None]).detach()
    folded.stem.bias.data = (model.norm.bias - model.norm.running_mean * scale).detach()
    folded.norm = nn.Identity()
    torch.testing.assert_close(folded(x), model(x))
    found, weights = relevance(model, x, labels)
    wanted, flowed = relevance(folded, x, labels)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights["stem.weight"], flowed["stem.weight"], rtol=1e-4, atol=1e-5)


def test_sums_below_zero_share_too():
    """Both terms of a sum are negative and what reads it turns the sign: they share by what they are."""
    x = torch.tensor([[-1.0, -3.0]])

    class Sum(nn.Module):
        def forward(self, x):
            return -2 * (x[:, :1] + x[:, 1:])

    with RelevanceRules():
        score = Sum()(x.requires_grad_())
    found = torch.autograd.grad(score, x, score.detach())[0]
    torch.testing.assert_close(found, torch.tensor([[2.0, 6.0]]))


def test_a_real_network_conserves_relevance_where_biases_are_zero():
    with seeded():
        model = randomize(omniconv.create_model("resnet8_small", num_classes=4)).eval()
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.bias.data.zero_()
                norm.running_mean.zero_()
        model.fc.bias.data.zero_()
        x, labels = torch.randn(3, 3, 32, 32), torch.tensor([0, 1, 2])
    score = model(x).gather(1, labels[:, None]).squeeze(1)
    found, _ = relevance(model, x, labels)
    torch.testing.assert_close(found.sum((1, 2, 3)), score, rtol=1e-3, atol=1e-5)


def test_what_no_answer_needs_goes_first():
    """Half of the units are not read by the class that is asked for."""
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 2, bias=False))
    with seeded():
        model[0].weight.data.uniform_(0.1, 1)
        model[2].weight.data = torch.tensor([[1.0] * 4 + [0.0] * 4, [0.0] * 4 + [9.0] * 4])
        x, labels = torch.rand(10, 6), torch.zeros(10, dtype=torch.long)
    structure = trace_structure(model, (6,))
    assert int((lrp_scores(model, structure, x, labels)["0"] == 0).sum()) == 4
    smaller, report = lrp_pruning(model, (6,), x, labels, 0.5, structure=structure)
    assert torch.equal(smaller[0].weight, model[0].weight[:4])
    torch.testing.assert_close(smaller(x)[:, 0], model(x)[:, 0])
    assert report.after.parameters == 4 * 6 + 4 * 2


def test_steps_remove_as_many_as_asked_and_none_returns():
    model, _, _ = made()
    structure = trace_structure(model, (2, 16, 24))
    seen = []

    def scores(masked, graph):
        seen.append(masked)
        return unit_norms(masked, graph)

    keep = choose_stepwise(model, structure, scores, 0.4, step=0.2)
    units = sum(map(len, keep.values()))
    assert len(seen) == 2
    assert sum(int(k.sum()) for k in keep.values()) == units - round(0.4 * units)
    first = seen[1]
    kept = {name: (p != 0).any() for name, p in first.named_parameters()}
    assert all(kept.values())


def test_errors():
    model, x, labels = made()
    with pytest.raises(ValueError, match="beta must not be negative: got -1"):
        RelevanceRules(-1)
    with pytest.raises(ValueError, match=r"ratio must lie in \[0, 1\): got 1"):
        lrp_pruning(model, (2, 16, 24), x, labels, 1)
    with pytest.raises(ValueError, match="step must be positive: got 0"):
        lrp_pruning(model, (2, 16, 24), x, labels, 0.5, step=0)
