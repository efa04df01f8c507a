"""Neighbours drawn at random: what mini-batches of graph networks are made of.

Paper: Hamilton et al., Inductive Representation Learning on Large Graphs (GraphSAGE),
https://arxiv.org/abs/1706.02216.
"""

import torch
from torch import Tensor

__all__ = ["adjacency", "sample_neighbours"]


def adjacency(edges: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
    """Return the neighbours of all nodes one after another, as (offsets, neighbours).

    Those of node v are `neighbours[offsets[v]:offsets[v + 1]]`, in the order of `edges`.

    Args:
        edges: directed edges (2, E); the neighbours of a node are where its edges go.
        nodes: how many there are.

    Returns:
        offsets (nodes + 1,) and neighbours (E,), int64.
    """
    degrees = torch.bincount(edges[0], minlength=nodes)
    offsets = torch.cat([degrees.new_zeros(1), degrees.cumsum(0)])
    return offsets, edges[1, edges[0].argsort(stable=True)]


def sample_neighbours(
    offsets: Tensor,
    neighbours: Tensor,
    nodes: Tensor,
    count: int,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return neighbours of nodes drawn with replacement, each equally likely; a node without any gets itself.

    Args:
        offsets: of `adjacency`.
        neighbours: of `adjacency`.
        nodes: (B,).
        count: draws for every node.
        generator: of random numbers.

    Returns:
        (B, count).
    """
    first, degree = offsets[nodes], offsets[nodes + 1] - offsets[nodes]
    # In float64, so that a share below 1 of any degree stays below it.
    share = torch.rand(len(nodes), count, generator=generator, dtype=torch.float64, device=nodes.device)
    chosen = first[:, None] + (share * degree[:, None]).long()
    # A last entry for those without neighbours to point at.
    drawn = torch.cat([neighbours, neighbours.new_zeros(1)])[chosen]
    return torch.where((degree == 0)[:, None], nodes[:, None], drawn)
