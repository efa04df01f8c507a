import itertools

import torch

from omniconv.graphs.neighbour_sampling import adjacency, sample_neighbours

EDGES = torch.tensor([[2, 0, 0, 3, 0], [1, 3, 2, 0, 1]])


def test_adjacency_lists_the_ends_of_each_nodes_edges():
    offsets, neighbours = adjacency(EDGES, 5)
    lists = [neighbours[a:b].tolist() for a, b in itertools.pairwise(offsets)]
    assert lists == [[3, 2, 1], [], [1], [0], []]


def test_each_neighbour_is_drawn_equally_often_and_nothing_else():
    offsets, neighbours = adjacency(EDGES, 5)
    random = torch.Generator().manual_seed(0)
    drawn = sample_neighbours(offsets, neighbours, torch.tensor([0, 2, 4, 1]), 6000, generator=random)
    counts = torch.bincount(drawn[0], minlength=5).tolist()
    assert counts[0] == counts[4] == 0
    assert all(abs(count - 2000) < 200 for count in counts[1:4])
    assert [set(row.tolist()) for row in drawn[1:]] == [{1}, {4}, {1}]


def test_a_graph_without_edges_gives_the_nodes_themselves():
    offsets, neighbours = adjacency(torch.empty(2, 0, dtype=torch.int64), 3)
    nodes = torch.tensor([2, 0])
    assert sample_neighbours(offsets, neighbours, nodes, 2).tolist() == [[2, 2], [0, 0]]
