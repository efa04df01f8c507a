import itertools

import numpy as np
import pytest

from omniconv.compress.quantize.allocate import allocate, frontier


def tables(seed, layers=5, choices=3):
    random = np.random.default_rng(seed)
    sizes = np.sort(random.integers(1, 60, (layers, choices)), 1)
    return random.random((layers, choices)) ** 3, sizes


def everything(costs, sizes):
    layers = np.arange(len(costs))
    for choices in itertools.product(range(costs.shape[1]), repeat=len(costs)):
        yield choices, costs[layers, choices].sum(), sizes[layers, choices].sum()


@pytest.mark.parametrize("seed", [0, 1])
def test_both_find_what_trying_everything_finds(seed):
    costs, sizes = tables(seed)
    points = list(everything(costs, sizes))
    front = frontier(costs, sizes)
    for budget in range(int(sizes.min(1).sum()), int(sizes.max(1).sum()) + 1, 9):
        best = min(cost for _, cost, size in points if size <= budget)
        found = allocate(costs, sizes, budget)
        assert found.size <= budget
        assert found.cost == pytest.approx(best)
        assert [p for p in front if p.size <= budget][-1].cost == pytest.approx(best)
    assert all(a.size < b.size and a.cost > b.cost for a, b in itertools.pairwise(front))
    # The other way about: the smallest that loses no more.
    limit = float(np.median([cost for _, cost, _ in points]))
    least = min(size for _, cost, size in points if cost <= limit)
    assert allocate(sizes, costs, limit).cost == least


def test_rounded_sizes_keep_the_budget():
    costs, sizes = tables(3, 8)
    coarse = frontier(costs, sizes, unit=10.0)
    assert len(coarse) <= sizes.max(1).sum() / 10 + 8
    exact = frontier(costs, sizes)
    assert coarse[0].cost <= exact[0].cost * 1.0001 or coarse[0].size >= exact[0].size


def test_what_is_wrong_is_said():
    with pytest.raises(ValueError, match="the smallest choices take 3: got a budget of 2"):
        allocate([[1.0, 0.0]], [[3, 5]], 2)
    with pytest.raises(ValueError, match="finite tables"):
        frontier([[1.0]], [[1, 2]])
