"""Which layer gets how many bits: an integer program for one budget, dynamic programming for all of them.

Both take what a choice costs in a layer, `costs[l][c]`, and what it takes, `sizes[l][c]`, and assume that both add
up over layers. Integer program: Hubara et al., https://arxiv.org/abs/2006.10518. Pareto frontier: Cai et al.,
https://arxiv.org/abs/2001.00281.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Allocation", "allocate", "frontier"]

Table = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Allocation:
    """A choice for every layer.

    Attributes:
        choices: index of the choice, layer by layer.
        cost: sum over layers.
        size: sum over layers.
    """

    choices: tuple[int, ...]
    cost: float
    size: float


def _tables(costs: Table, sizes: Table) -> tuple[np.ndarray, np.ndarray]:
    cost, size = np.asarray(costs, float), np.asarray(sizes, float)
    if cost.ndim != 2 or cost.shape != size.shape or not cost.size or not np.isfinite([cost, size]).all():
        raise ValueError(
            f"costs and sizes must be finite tables of layers by choices: got {cost.shape} and {size.shape}"
        )
    return cost, size


def _allocation(choices: Sequence[int], cost: np.ndarray, size: np.ndarray) -> Allocation:
    layers = np.arange(len(cost))
    return Allocation(
        tuple(map(int, choices)), float(cost[layers, choices].sum()), float(size[layers, choices].sum())
    )


def allocate(costs: Table, sizes: Table, budget: float) -> Allocation:
    r"""Return the cheapest choices within a budget, by `integer programming <https://arxiv.org/abs/2006.10518>`_.

    .. math:: \min_x \sum_{l,c} \mathrm{cost}_{lc}\, x_{lc} \quad \text{with} \quad
              \sum_{l,c} \mathrm{size}_{lc}\, x_{lc} \le B, \quad \sum_c x_{lc} = 1, \quad x_{lc} \in \{0, 1\}

    With the arguments changed about, `allocate(sizes, costs, degradation)`, it is the smallest model that loses no
    more than `degradation`.

    Args:
        costs: layers by choices.
        sizes: layers by choices.
        budget: for the sum of the sizes.

    Raises:
        ValueError: if the tables are not finite or not alike, or even the smallest choices exceed the budget.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    cost, size = _tables(costs, sizes)
    least = size.min(1).sum()
    if least > budget:
        raise ValueError(f"the smallest choices take {least:g}: got a budget of {budget:g}")
    layers, choices = cost.shape
    once = np.kron(np.eye(layers), np.ones(choices))
    # The solver's tolerances are absolute.
    unit, weight = max(abs(cost).max(), 1e-300) / 1e3, max(abs(size).max(), 1e-300) / 1e3
    found = milp(
        cost.ravel() / unit,
        constraints=[
            LinearConstraint(once, 1, 1),  # pyright: ignore[reportArgumentType]
            LinearConstraint(size.reshape(1, -1) / weight, -np.inf, budget / weight),
        ],
        integrality=np.ones(cost.size),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    assert found.x is not None, found.message
    return _allocation(found.x.reshape(cost.shape).argmax(1), cost, size)


def frontier(costs: Table, sizes: Table, *, unit: float = 1.0) -> list[Allocation]:
    """Return every allocation that none beats in both size and cost, the smallest first.

    Layer by layer the best cost for each size is kept, as in `ZeroQ <https://arxiv.org/abs/2001.00281>`_:
    O(layers x choices x sizes).

    Args:
        costs: layers by choices.
        sizes: layers by choices.
        unit: sizes are rounded up to multiples of it while they are compared, which bounds their number.

    Raises:
        ValueError: if the tables are not finite or not alike.
    """
    cost, size = _tables(costs, sizes)
    counted = np.ceil(size / unit)
    total, loss = np.zeros(1), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []
    for layer in range(len(cost)):
        grown = (total[:, None] + counted[layer]).ravel()
        worse = (loss[:, None] + cost[layer]).ravel()
        order = np.lexsort((worse, grown))
        best = np.minimum.accumulate(np.concatenate([[np.inf], worse[order][:-1]]))
        kept = order[worse[order] < best]
        total, loss = grown[kept], worse[kept]
        steps.append(np.divmod(kept, cost.shape[1]))
    found = []
    for end in range(len(total)):
        choices: list[int] = []
        for came_from, choice in reversed(steps):
            choices.append(int(choice[end]))
            end = int(came_from[end])
        found.append(_allocation(choices[::-1], cost, size))
    return found
