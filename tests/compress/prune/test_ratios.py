import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from omniconv.compress.prune.ratios import (
    erk_densities,
    erk_magnitude,
    lamp,
    lamp_scores,
    snip,
    snip_scores,
    uniform_magnitude,
)

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.arange(16) % 10


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def loss(model: nn.Module) -> torch.Tensor:
    return F.cross_entropy(model(X), Y)


def counts(model: nn.Sequential) -> list[int]:
    return [int(model[i].weight.count_nonzero()) for i in (0, 3, 5)]


TOTAL = 3 * 8 * 9 + 8 * 16 * 9 + 2560
TRANSFORMS = {
    "uniform": uniform_magnitude,
    "erk": erk_magnitude,
    "lamp": lamp,
    "snip": lambda model, sparsity: snip(model, sparsity, loss),
}


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.777, 0.9, 0.98, 0.999])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_counts_are_exact_and_the_input_stays(name, sparsity):
    model = network()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    pruned, report = TRANSFORMS[name](model, sparsity)
    assert sum(counts(pruned)) == TOTAL - round(sparsity * TOTAL)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert report.before.parameters - report.after.nonzero >= round(sparsity * TOTAL)
    for i in (0, 3, 5):
        kept = pruned[i].weight != 0
        assert torch.equal(pruned[i].weight[kept], model[i].weight[kept])


def test_uniform_keeps_the_same_share_everywhere():
    pruned, report = uniform_magnitude(network(), 0.9)
    for layer in report.layers:
        assert abs(layer.nonzero - 0.1 * layer.weights) <= 1
    for i in (0, 3, 5):
        weight = network()[i].weight.abs()
        assert weight[pruned[i].weight != 0].min() >= weight[pruned[i].weight == 0].max()


def test_erk_densities_by_hand():
    # Without capping: both layers are scaled by the same epsilon.
    densities = erk_densities({"a": (10, 10), "b": (100, 100)}, 1100)
    assert densities["a"] == pytest.approx(1.0)
    assert densities["b"] == pytest.approx(0.1)
    densities = erk_densities({"a": (10, 10, 3, 3), "b": (100, 100, 3, 3)}, 232)
    assert densities["a"] == pytest.approx(26 / 900)
    assert densities["b"] == pytest.approx(206 / 90000)


@settings(deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(1, 30), min_size=2, max_size=4), min_size=1, max_size=6),
    share=st.floats(0, 1),
)
def test_erk_densities_add_up(shapes, share):
    named = {str(i): shape for i, shape in enumerate(shapes)}
    total = sum(map(math.prod, shapes))
    kept = round(share * total)
    densities = erk_densities(named, kept)
    assert all(0 <= density <= 1 + 1e-9 for density in densities.values())
    assert sum(densities[name] * math.prod(shape) for name, shape in named.items()) == pytest.approx(kept)
    # Layers that are not whole share one epsilon.
    epsilons = [d * math.prod(named[n]) / sum(named[n]) for n, d in densities.items() if d < 1]
    assert epsilons == pytest.approx(epsilons[:1] * len(epsilons))


def test_lamp_scores_by_the_equation():
    torch.manual_seed(0)
    magnitude = torch.rand(7, 5)
    flat = magnitude.flatten().double()
    expected = [float(w**2 / (flat[flat >= w] ** 2).sum()) for w in flat]
    torch.testing.assert_close(lamp_scores(magnitude).flatten(), torch.tensor(expected).double())
    assert lamp_scores(torch.zeros(3)).tolist() == [0, 0, 0]


def test_lamp_leaves_no_layer_empty():
    model = network()
    with torch.no_grad():
        model[3].weight.mul_(1e-6)
    pruned, _ = lamp(model, 1 - 3 / TOTAL)
    assert counts(pruned) == [1, 1, 1]


def test_lamp_does_not_see_the_scale_of_a_layer():
    model = network()
    expected = counts(lamp(model, 0.9)[0])
    with torch.no_grad():
        model[3].weight.mul_(2.0**-10)
    assert counts(lamp(model, 0.9)[0]) == expected


def test_snip_scores_are_the_derivative_by_a_gate():
    model = network().double()
    x = X.double()
    scores = snip_scores(model, lambda m: F.cross_entropy(m(x), Y))
    before = model.state_dict()["1.running_mean"].clone()
    for layer, index in (("0", (2, 1, 0, 2)), ("3", (4, 5, 1, 1)), ("5", (7, 100))):
        values = []
        for gate in (1 + 1e-5, 1 - 1e-5):
            twin = network().double()
            with torch.no_grad():
                twin.get_submodule(layer).weight[index] *= gate
                values.append(float(F.cross_entropy(twin(x), Y)))
        numeric = abs(values[0] - values[1]) / 2e-5
        assert float(scores[layer][index]) == pytest.approx(numeric, rel=1e-3, abs=1e-8)
    assert torch.equal(model.state_dict()["1.running_mean"], before)
