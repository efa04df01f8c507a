"""A tree, cut once at pivots, so that products with functions of its distances are cheap ever after.

Paper: Choromanski et al., Fast Tree-Field Integrators, https://arxiv.org/abs/2406.15881, section 3.1.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Cuts", "IntegratorTree", "spanning_tree"]

LEAF = 32
"""Trees of at most so many vertices are not cut: their distances are kept."""


@dataclass(frozen=True)
class Cuts:
    """Cuts with parts of similar size, so that they are computed together.

    Attributes:
        vertex: (P, 2, width), the vertices of both parts but the pivot; the number of vertices where there is none.
        distance: (P, 2, width), their distances to the pivot, 0 where there is no vertex.
        reach: the largest of these distances.
    """

    vertex: Tensor
    distance: Tensor
    reach: float


@dataclass(frozen=True)
class IntegratorTree:
    """A weighted tree cut at pivots into parts of a quarter to three quarters of its vertices, and so on.

    Any two vertices meet in exactly one place: on two sides of one cut, where their distance is the sum of those to
    the pivot, or in one small tree whose distances are kept. Made by `IntegratorTree.of`. Distances are integers
    if all weights are.

    Attributes:
        count: n, the number of vertices.
        leaf_vertex, leaf_distance: (P, 32) and (P, 32, 32), the small trees and the distances within, padded by n
            and 0.
        cuts: all cuts, those of similar size together.
        parts: (cuts, 2), how many vertices each part of every cut has, the pivot included in both.
        step: the number of which all weights are multiples, or None if they lie on no lattice.
    """

    count: int
    leaf_vertex: Tensor
    leaf_distance: Tensor
    cuts: tuple[Cuts, ...]
    parts: Tensor
    step: float | None

    @classmethod
    def of(cls, edges: Tensor | np.ndarray, weights: Tensor | np.ndarray | None = None) -> "IntegratorTree":
        """Cut a tree, in time near-linear in its size.

        Args:
            edges: (n - 1, 2), pairs of vertices 0 to n - 1.
            weights: (n - 1), their positive lengths; 1 by default.

        Raises:
            ValueError: if the edges are no tree or a weight is not positive.
        """
        # Compiles, and imports numba, when the first tree is cut.
        from omniconv.ops.tree_field import _split

        edges = np.ascontiguousarray(edges, np.int64).reshape(-1, 2)
        weights = np.ones(len(edges)) if weights is None else np.asarray(weights, np.float64)
        n = len(edges) + 1
        if weights.shape != (n - 1,) or not (weights > 0).all():
            raise ValueError(f"weights must be {n - 1} positive numbers, one an edge: got {weights}")
        if edges.size and not (0 <= edges.min() and edges.max() < n):
            raise ValueError(
                f"{n - 1} edges of a tree join vertices 0 to {n - 1}: got {edges.min()} to {edges.max()}"
            )
        forest = _split.rooted(n, edges, weights)
        if len(forest[0]) < n:
            raise ValueError(f"edges must form a tree: vertex 0 reaches {len(forest[0])} of {n} vertices")
        forest = (*forest, np.array([0, n]))
        leaves, levels, cuts = [], [], 0
        while len(forest[3]) > 1:
            leaves.append(_split.distances(*forest, LEAF, n))
            side, distance, parts = _split.split(*forest, LEAF)
            sizes = np.diff(forest[3])
            number = np.repeat(cuts + np.cumsum(sizes > LEAF) - 1, sizes)
            on = side >= 0
            levels.append((2 * number[on] + side[on], forest[0][on], distance[on]))
            cuts += int((sizes > LEAF).sum())
            forest = parts
        whole = np.int64 if (weights == np.round(weights)).all() else np.float64
        members, within = (np.concatenate(arrays) for arrays in zip(*leaves, strict=True))
        key, vertex, distance = (np.concatenate(arrays) for arrays in zip(*levels, strict=True))
        return cls(
            n,
            torch.as_tensor(members),
            torch.as_tensor(within.astype(whole)),
            _collect(n, key, vertex, distance.astype(whole)),
            torch.as_tensor(np.bincount(key, minlength=2 * cuts).reshape(-1, 2) + 1),
            _step(weights),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name."""
        held = {"leaf_vertex": self.leaf_vertex, "leaf_distance": self.leaf_distance, "parts": self.parts}
        for index, cuts in enumerate(self.cuts):
            held |= {f"vertex{index}": cuts.vertex, f"distance{index}": cuts.distance}
        return held

    def holding(self, tensors: Mapping[str, Tensor]) -> "IntegratorTree":
        """Return the same tree with other `tensors`, such as copies on another device."""
        cuts = tuple(
            Cuts(tensors[f"vertex{index}"], tensors[f"distance{index}"], old.reach)
            for index, old in enumerate(self.cuts)
        )
        kept = tensors["leaf_vertex"], tensors["leaf_distance"]
        return IntegratorTree(self.count, *kept, cuts, tensors["parts"], self.step)

    def to(self, device: torch.device | str) -> "IntegratorTree":
        """Return the same tree on `device`."""
        return self.holding({name: tensor.to(device) for name, tensor in self.tensors().items()})


def _collect(n: int, key: np.ndarray, vertex: np.ndarray, distance: np.ndarray) -> tuple[Cuts, ...]:
    """Lay out the sides 2 * cut + (0 or 1) of all cuts, those whose width has the same power of two together."""
    order = np.argsort(key, kind="stable")
    key, vertex, distance = key[order], vertex[order], distance[order]
    sizes = np.bincount(key)
    place = np.arange(len(key)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    width = sizes.reshape(-1, 2).max(1, initial=1)
    power = np.ceil(np.log2(width)).astype(np.int64)
    collected = []
    for group in np.unique(power):
        chosen = power == group
        on = chosen[key // 2]
        row = np.cumsum(chosen) - 1
        where = row[key[on] // 2], key[on] % 2, place[on]
        shape = (int(chosen.sum()), 2, int(width[chosen].max()))
        vertices, distances = np.full(shape, n), np.zeros(shape, distance.dtype)
        vertices[where], distances[where] = vertex[on], distance[on]
        collected.append(Cuts(torch.as_tensor(vertices), torch.as_tensor(distances), float(distances.max())))
    return tuple(collected)


def _step(weights: np.ndarray, most: int = 64) -> float | None:
    """Return the largest number of which all weights are multiples, of at most `most`, or None."""
    if not len(weights):
        return 1.0
    whole = bool((weights == np.round(weights)).all())
    step = float(np.gcd.reduce(weights.astype(np.int64))) if whole else float(weights.min())
    multiples = weights / step
    on = np.abs(multiples - np.round(multiples)).max() < 1e-9 and multiples.max() <= most
    return step if on else None


def spanning_tree(edges: Tensor | np.ndarray, weights: Tensor | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return edges and weights of a minimum spanning tree of a connected graph.

    Args:
        edges: (m, 2), pairs of vertices 0 to n - 1, each once.
        weights: (m), their positive lengths.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import minimum_spanning_tree

    pairs = np.asarray(edges)
    n = int(pairs.max()) + 1
    tree = minimum_spanning_tree(coo_matrix((np.asarray(weights), pairs.T), (n, n))).tocoo()
    return np.stack([tree.row, tree.col], 1), tree.data
