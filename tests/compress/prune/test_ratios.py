import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from omniconv.compress.prune.ratios import (
    erdos_renyi_densities,
    erk_densities,
    erk_magnitude,
    keep_counts,
    lamp,
    lamp_scores,
    snip,
    uniform_magnitude,
    uniform_plus_densities,
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


SHAPES = {"stem": (16, 3, 3, 3), "deep": (64, 32, 3, 3), "wide": (128, 64, 1, 1), "head": (10, 128)}


def test_erdos_renyi_is_erk_of_pixels_and_does_not_see_the_kernel():
    for kept in (900, 3000, 9000):
        densities = erdos_renyi_densities(SHAPES, kept)
        pixels = {name: (*shape[:2], 1, 1) for name, shape in SHAPES.items()}
        raw = {name: sum(shape[:2]) / math.prod(shape[:2]) for name, shape in pixels.items()}
        sparse = [name for name, density in densities.items() if density < 1]
        scales = [densities[name] / raw[name] for name in sparse]
        assert scales == pytest.approx(scales[:1] * len(scales))
        # Those that are whole would have been over their size.
        assert all(raw[name] * scales[0] >= 1 for name in densities if name not in sparse)
        assert sum(densities[n] * math.prod(s) for n, s in SHAPES.items()) == pytest.approx(kept)


@pytest.mark.parametrize("kept", [3000, 15000])
def test_uniform_plus_spares_the_first_and_the_last_layer(kept):
    densities = uniform_plus_densities(SHAPES, kept)
    assert densities["stem"] == 1
    assert densities["deep"] == densities["wide"]
    assert densities["head"] == max(0.2, densities["deep"])
    assert sum(densities[n] * math.prod(s) for n, s in SHAPES.items()) == pytest.approx(kept)


def test_uniform_plus_cannot_keep_fewer():
    with pytest.raises(
        ValueError, match="uniform\\+ keeps the first layer and a fifth of the last, 688 weights"
    ):
        uniform_plus_densities(SHAPES, 687)
    assert uniform_plus_densities({"only": (4, 5)}, 10) == {"only": 0.5}


def test_keep_counts_takes_each_layers_largest():
    scores = {"a": torch.tensor([[3.0, 1.0], [2.0, 2.0]]), "b": torch.tensor([5.0, 6.0])}
    masks = keep_counts(scores, {"a": 2, "b": 0})
    assert masks["a"].tolist() == [[True, False], [False, True]]
    assert masks["b"].tolist() == [False, False]
