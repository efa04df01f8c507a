"""Loops that split a tree at pivots, compiled by numba where it is installed and plain Python otherwise.

A forest is four arrays: every tree is a run of places in which parents come before children. `vertex` names what
stands in a place, `parent` is the place of its parent (-1 for a root), `weight` the length of the edge between
them, and `starts` holds the first place of every tree and, at its end, the number of places.
"""

from typing import Any

import numpy as np

from omniconv.ops._numba import HAS_NUMBA


def compiled(function: Any) -> Any:
    """Return the function compiled, or as it is where numba is not installed."""
    if not HAS_NUMBA:
        return function
    from numba import njit

    return njit(nogil=True, cache=True)(function)


@compiled
def rooted(count, edges, weights):
    """Return (vertex, parent, weight) of the tree seen from vertex 0; shorter than `count` if not connected."""
    starts = np.zeros(count + 1, np.int64)
    for edge in range(len(edges)):
        starts[edges[edge, 0] + 1] += 1
        starts[edges[edge, 1] + 1] += 1
    starts = np.cumsum(starts)
    free = starts.copy()
    neighbour = np.empty(2 * len(edges), np.int64)
    length = np.empty(2 * len(edges))
    for edge in range(len(edges)):
        for end in range(2):
            here = edges[edge, end]
            neighbour[free[here]] = edges[edge, 1 - end]
            length[free[here]] = weights[edge]
            free[here] += 1
    vertex, parent = np.zeros(count, np.int64), np.full(count, -1, np.int64)
    weight = np.zeros(count)
    seen = np.zeros(count, np.bool_)
    seen[0] = True
    done, found = 0, 1
    while done < found:
        for link in range(starts[vertex[done]], starts[vertex[done] + 1]):
            other = neighbour[link]
            if not seen[other]:
                seen[other] = True
                vertex[found], parent[found], weight[found] = other, done, length[link]
                found += 1
        done += 1
    return vertex[:found], parent[:found], weight[:found]


@compiled
def split(vertex, parent, weight, starts, leaf):
    """Split every tree of more than `leaf` vertices at a pivot into two that share it.

    Returns:
        side (0, 1; -1 for pivots and for trees that stay whole) and distance to the pivot of every place, then
        the forest of the parts: (vertex, parent, weight, starts).
    """
    total, trees = len(vertex), len(starts) - 1
    side, distance = np.full(total, -1, np.int8), np.full(total, -1.0)
    size, place = np.ones(total, np.int64), np.empty(total, np.int64)
    next_vertex, next_parent = np.empty(total + trees, np.int64), np.empty(total + trees, np.int64)
    next_weight, next_starts = np.empty(total + trees), np.zeros(2 * trees + 1, np.int64)
    filled, parts = 0, 0
    for tree in range(trees):
        begin, end = starts[tree], starts[tree + 1]
        count = end - begin
        if count <= leaf:
            continue
        for i in range(end - 1, begin, -1):
            size[parent[i]] += size[i]
        pivot = end - 1
        while 2 * size[pivot] < count:
            pivot -= 1
        # No branch at the pivot holds more than half. Each joins the lighter side, the largest first.
        roots = [i for i in range(pivot + 1, end) if parent[i] == pivot]
        sizes = [size[i] for i in roots]
        if pivot != begin:
            roots.append(begin)
            sizes.append(count - size[pivot])
        load = [0, 0]
        for branch in np.argsort(-np.array(sizes)):
            lighter = 0 if load[0] <= load[1] else 1
            side[roots[branch]] = lighter
            load[lighter] += sizes[branch]
        distance[pivot] = 0
        i = pivot
        while i != begin:
            distance[parent[i]] = distance[i] + weight[i]
            i = parent[i]
        for i in range(begin, end):
            if distance[i] < 0:
                distance[i] = distance[parent[i]] + weight[i]
            if i != pivot and side[i] < 0:
                side[i] = side[parent[i]]
        for part in range(2):
            # The part with the old root keeps it, the other one hangs from the pivot; so no order changes.
            below = pivot == begin or side[begin] != part
            middle = filled
            for i in range(begin - 1, end):
                if i == begin - 1:
                    if not below:
                        continue
                    next_vertex[filled], next_parent[filled], next_weight[filled] = vertex[pivot], -1, 0.0
                elif i == pivot:
                    if below:
                        continue
                    middle = filled
                    next_vertex[filled], next_weight[filled] = vertex[i], weight[i]
                    next_parent[filled] = place[parent[i]]
                elif side[i] == part:
                    up = parent[i]
                    place[i] = filled
                    next_vertex[filled], next_weight[filled] = vertex[i], weight[i]
                    next_parent[filled] = -1 if up < 0 else middle if up == pivot else place[up]
                else:
                    continue
                filled += 1
            parts += 1
            next_starts[parts] = filled
    forest = next_vertex[:filled], next_parent[:filled], next_weight[:filled], next_starts[: parts + 1]
    return side, distance, forest


@compiled
def distances(vertex, parent, weight, starts, leaf, missing):
    """Return vertices (trees, leaf) and distances (trees, leaf, leaf) of small trees, padded by `missing` and 0."""
    trees = np.flatnonzero(np.diff(starts) <= leaf)
    members = np.full((len(trees), leaf), missing, np.int64)
    result = np.zeros((len(trees), leaf, leaf))
    for row, tree in enumerate(trees):
        begin = starts[tree]
        for i in range(starts[tree + 1] - begin):
            members[row, i] = vertex[begin + i]
            for j in range(i):
                up = parent[begin + i] - begin
                result[row, i, j] = result[row, j, i] = result[row, up, j] + weight[begin + i]
    return members, result
