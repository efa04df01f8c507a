"""Members lie in their space as counted, distributions equal sorting, and the best of a sample is returned."""

import functools

import numpy as np
import pytest
import torch
from torch import nn

import omniconv
from omniconv.compress.prune.pruning_spaces import (
    PruningSpace,
    error_distribution,
    keep_largest_units,
    optimal_ratio,
    space_pruning,
)
from omniconv.compress.structure.graph import trace_structure
from omniconv.design.cost import count_cost
from omniconv.testing.harness import seeded

SHAPE = (3, 24, 32)


@functools.cache
def made():
    with seeded():
        model = omniconv.create_model("resnet8_small", num_classes=5).eval()
    return model, trace_structure(model, SHAPE)


def test_members_are_as_large_as_they_say_and_lie_in_the_space():
    model, structure = made()
    space = PruningSpace((0.45, 0.55), parameters=(0.3, 0.7), ratio=(0.9, 1.5))
    drawn = space.sample(structure, 4, seed=3)
    whole = count_cost(model, SHAPE)
    for member in drawn.members:
        smaller = structure.remove(model, keep_largest_units(model, structure, member.counts))
        cost = count_cost(smaller, SHAPE)
        assert cost.macs / whole.macs == pytest.approx(member.macs, abs=1e-12)
        assert cost.parameters / whole.parameters == pytest.approx(member.parameters, abs=1e-12)
        assert 0.45 <= cost.macs / whole.macs <= 0.55
        assert 0.3 <= cost.parameters / whole.parameters <= 0.7
        assert 0.9 <= member.ratio <= 1.5
        kept = [count / structure.groups[name].size for name, count in member.counts.items()]
        assert member.spread == pytest.approx(float(np.std(kept)))
    assert 0 < drawn.acceptance < 1
    again = space.sample(structure, 4, seed=3)
    assert again == drawn != space.sample(structure, 4, seed=4)


def test_the_largest_filters_stay():
    model, structure = made()
    keep = keep_largest_units(model, structure, {"layer1.0.conv1": 5})["layer1.0.conv1"]
    block = model.layer1[0]
    norms = block.conv1.weight.abs().sum((1, 2, 3)) + block.conv2.weight.abs().sum((0, 2, 3))
    assert keep.sum() == 5
    assert norms[keep].min() > norms[~keep].max()


def test_the_distribution_equals_counting():
    errors = [3.0, 1.0, 2.0, 2.0, 5.0]
    at = [0.0, 1.0, 1.5, 2.0, 2.5, 5.0, 6.0]
    wanted = [sum(e < one for e in errors) / 5 for one in at]
    assert error_distribution(errors, at).tolist() == wanted


def test_the_optimum_is_the_vertex_or_the_better_end():
    ratios = np.exp(np.linspace(-1, 1, 9))
    best, curvature = optimal_ratio(ratios, 3 * (np.log(ratios) - 0.2) ** 2 + 1)
    assert best == pytest.approx(np.exp(0.2))
    assert curvature == pytest.approx(6)
    best, curvature = optimal_ratio(ratios, -((np.log(ratios) - 0.2) ** 2))
    assert best == pytest.approx(np.exp(-1))
    assert curvature == pytest.approx(-2)
    assert optimal_ratio(ratios, (np.log(ratios) + 4) ** 2)[0] == pytest.approx(np.exp(-1))


def test_the_best_of_the_sample_is_returned():
    model, structure = made()
    seen = {}

    def score(candidate):
        candidate.fc.bias.data.fill_(7)
        seen[candidate] = -float(sum(p.numel() for p in candidate.parameters()))
        return seen[candidate]

    best, report = space_pruning(model, SHAPE, score, PruningSpace((0.4, 0.6)), count=3, structure=structure)
    assert len(seen) == 3
    assert seen[best] == max(seen.values()) == -report.after.parameters
    assert bool((best.fc.bias == 7).all())
    assert not bool((model.fc.bias == 7).any())


def test_errors():
    _, structure = made()
    with pytest.raises(ValueError, match="10 draws found 0 of 2 members; widen the space's bounds"):
        PruningSpace((0.5, 0.5)).sample(structure, 2, tries=10)
    with pytest.raises(ValueError, match="no group of channels of this model can be removed"):
        space_pruning(nn.Linear(3, 3), (3,), lambda model: float(torch.tensor(0)))
