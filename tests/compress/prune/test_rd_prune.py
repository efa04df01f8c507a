import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from omniconv.compress.prune.global_magnitude import global_magnitude
from omniconv.compress.prune.masks import prunable_weights
from omniconv.compress.prune.rd_prune import allocate, distortion_curves, rd_masks, rd_prune

X = torch.randn(10, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Hard(nn.Module):
    """A residual network with work in place, a layer that runs twice and a shared weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.first = nn.Conv2d(8, 8, 1, bias=False)
        self.second = nn.Conv2d(8, 8, 1, bias=False)
        self.second.weight = self.first.weight
        self.head = nn.Linear(8, 4)
        self.unused = nn.Linear(10, 10)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu_()
        y = self.first(x)
        y += x
        y = self.twice(self.twice(y).tanh_()).add_(y)
        return self.head(self.second(y).relu_().mean((2, 3)))


def made() -> Hard:
    torch.manual_seed(0)
    return Hard()


@pytest.mark.parametrize("worst_case", [False, True])
def test_curves_equal_one_changed_copy_at_a_time(worst_case):
    model = made().train()
    kept = {n: [w.numel(), w.numel() // 2, 3, 0] for n, w in prunable_weights(model).items()}
    curves = distortion_curves(model, X, kept, worst_case=worst_case, batch=4)
    assert model.training
    reference = copy.deepcopy(model).eval()(X).detach()
    for name, counts in kept.items():
        for count, measured in zip(counts, curves[name], strict=True):
            changed = copy.deepcopy(model).eval().requires_grad_(False)
            weight = changed.get_submodule(name).weight
            small = weight.abs().flatten().argsort()[: weight.numel() - count]
            weight.view(-1)[small] = 0
            errors = (changed(X) - reference).double().square().mean(1)
            expected = errors.max() if worst_case else errors.mean()
            assert measured == pytest.approx(float(expected), rel=1e-4, abs=1e-12), (name, count)
    assert curves["unused"].tolist() == [0] * 4
    assert curves["stem"][2] > 0


@pytest.mark.parametrize("seed", range(5))
def test_dynamic_programming_equals_brute_force(seed):
    random = np.random.default_rng(seed)
    kept = [sorted(random.integers(0, 60, 4).tolist(), reverse=True) for _ in range(4)]
    cost = random.random((4, 4)).tolist()
    # A budget that something meets.
    budget = sum(map(min, kept)) + int(random.integers(0, 80))
    level = allocate(kept, cost, budget)
    assert sum(k[i] for k, i in zip(kept, level, strict=True)) <= budget
    best = min(
        sum(c[i] for c, i in zip(cost, chosen, strict=True))
        for chosen in itertools.product(range(4), repeat=4)
        if sum(k[i] for k, i in zip(kept, chosen, strict=True)) <= budget
    )
    assert sum(c[i] for c, i in zip(cost, level, strict=True)) == pytest.approx(best)


def test_coarse_steps_never_exceed_the_budget():
    random = np.random.default_rng(0)
    kept = [sorted(random.integers(1, 9999, 6).tolist(), reverse=True) for _ in range(9)]
    cost = [sorted(row) for row in random.random((9, 6)).tolist()]
    exact, coarse = (allocate(kept, cost, 30_001, steps=steps) for steps in (30_001, 200))
    used, distortion = (
        [sum(row[i] for row, i in zip(rows, level, strict=True)) for level in (exact, coarse)]
        for rows in (kept, cost)
    )
    assert max(used) <= 30_001
    assert distortion[0] <= distortion[1] <= 1.1 * distortion[0]


def test_a_budget_that_nothing_meets():
    with pytest.raises(
        ValueError, match="the levels keep at least 7 weights of a budget of 6; add lower ones"
    ):
        allocate([[9, 3], [5, 4]], [[0, 1], [0, 1]], 6)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.93, 0.99])
def test_counts_are_exact_and_the_largest_stay(sparsity):
    model = made()
    pruned, report = rd_prune(model, sparsity, X)
    weights = prunable_weights(model)
    total = sum(weight.numel() for weight in weights.values())
    assert sum(layer.nonzero for layer in report.layers if layer.name != "second") == total - round(
        sparsity * total
    )
    for name, weight in prunable_weights(pruned).items():
        kept = weight != 0
        assert torch.equal(weight[kept], weights[name][kept])
        if kept.any() and not kept.all():
            assert weights[name][kept].abs().min() >= weights[name][~kept].abs().max()


class Half(nn.Module):
    """Of two equal layers the output sees one."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.unseen = nn.Linear(20, 20), nn.Linear(20, 20)

    def forward(self, x):
        return self.seen(x) + 0 * self.unseen(x)


def test_what_the_output_does_not_see_goes_first():
    pruned, _ = rd_prune(Half(), 0.5, torch.randn(50, 20))
    # The grid's lowest level is an eighth of the share.
    assert int(pruned.unseen.weight.count_nonzero()) == 400 * 0.5 / 8
    assert int(pruned.seen.weight.count_nonzero()) == 375


def test_a_pruned_model_is_pruned_further():
    model, _ = global_magnitude(made(), 0.3)
    gone = {name: weight == 0 for name, weight in prunable_weights(model).items()}
    masks = rd_masks(model, 0.6, X, grid=6)
    assert all((~masks[name])[mask].all() for name, mask in gone.items())
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int((~mask).sum()) for mask in masks.values()) == round(0.6 * total)


def test_errors():
    with pytest.raises(ValueError, match="grid must be at least 2: got 1"):
        rd_prune(made(), 0.5, X, grid=1)
    with pytest.raises(ValueError, match="the model must return a tensor: got tuple"):
        rd_prune(Pair(), 0.5, torch.randn(2, 3))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        return self.fc(x), x
