"""Graphs of known layers, and the search itself on problems with a known answer."""

import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from omniconv.design.nas.evonorm_search import (
    LEAVES,
    GraphNorm,
    Node,
    evolve,
    gradient_ascent,
    mutate,
    pareto,
    random_layer,
)
from omniconv.layers.norm.evonorm import EvoNormB0, EvoNormS0

# Leaves: 0 is the input, 1 zero, 2 and 3 vectors that start at zero and one.
UNUSED = Node("exp", (0, 0))
BATCH_NORM_RELU = (
    Node("mean_bwh", (0, 0)),
    Node("neg", (4, 0)),
    Node("add", (0, 5)),
    Node("deviation_bwh", (0, 0)),
    Node("div", (6, 7)),
    Node("max", (8, 1)),
)
S0 = (
    Node("mul", (0, 3)),
    Node("sigmoid", (4, 0)),
    Node("mul", (0, 5)),
    Node("deviation_whg", (0, 0)),
    Node("div", (6, 7)),
)
B0 = (
    Node("mul", (0, 3)),
    Node("deviation_wh", (0, 0)),
    Node("add", (4, 5)),
    Node("deviation_bwh", (0, 0)),
    Node("max", (6, 7)),
    Node("div", (0, 8)),
)


@pytest.mark.parametrize(
    ("layer", "known"),
    [
        (BATCH_NORM_RELU, lambda x: F.relu(F.batch_norm(x, None, None, training=True))),
        (S0, EvoNormS0(8, 4)),
        (B0, EvoNormB0(8)),
    ],
)
def test_known_layers_are_graphs(layer, known):
    x = torch.randn(4, 8, 5, 6)
    torch.testing.assert_close(GraphNorm(layer, 8, groups=4)(x), known(x), atol=1e-3, rtol=1e-3)


def test_moments_over_the_batch_are_averaged_for_inference():
    norm, x = GraphNorm(BATCH_NORM_RELU, 8), torch.randn(16, 8, 5, 5)
    expected = norm(x)
    torch.testing.assert_close(norm.eval()(x), expected)
    assert not torch.allclose(norm.train()(x[:2]), expected[:2], atol=1e-2)
    norm.eval()
    torch.testing.assert_close(norm(x)[:1], norm(x[:1]))


def test_every_random_graph_can_be_evaluated_and_mutation_changes_one_node():
    source = random.Random(0)
    x = torch.randn(2, 8, 3, 3)
    dependent = 0
    for _ in range(50):
        layer = random_layer(source)
        norm = GraphNorm(layer, 8)
        y = norm(x)
        assert y.shape == x.shape
        if not norm.reads_input:
            torch.testing.assert_close(y, norm(x + 1), equal_nan=True)
        dependent += norm.reads_input
        child = mutate(layer, source)
        assert sum(a != b for a, b in zip(layer, child, strict=True)) <= 1
        assert all(max(node.inputs) < LEAVES + index for index, node in enumerate(child))
    assert 10 < dependent < 50


def test_the_ascent_reaches_the_gradient_that_a_parabola_has_there():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 2.0)
    reached = gradient_ascent(model, lambda m: 1.5 * m.weight.square().sum(), steps=5, lr=0.5)
    assert reached == pytest.approx(3 * (2 + 4 * 0.5), rel=1e-3)


def test_the_ascent_stops_at_the_limit_and_calls_overflow_infinite():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 100.0)
    assert gradient_ascent(model, lambda m: m.weight.exp().exp().sum(), lr=1.0) == float("inf")
    nn.init.constant_(model.weight, 1.0)
    assert 1e3 < gradient_ascent(model, lambda m: m.weight.exp().sum(), lr=1.0, limit=1e3) < 1e4


def test_the_pareto_front_is_what_nothing_beats():
    assert pareto([(1, 5), (2, 4), (1, 4), (3, 1), (2, 4)]) == [0, 1, 3, 4]


def test_evolution_beats_chance_where_single_nodes_count():
    def score(layer):
        return (sum(node.operation == "add" for node in layer),)

    found = evolve(score, random.Random(1), trials=400, population=20)
    best = max(candidate.scores for candidate in found[:20]), max(candidate.scores for candidate in found)
    assert best[1][0] >= best[0][0] + 4
    assert len(evolve(lambda layer: None, random.Random(0), trials=5)) == 0
