"""The knapsack is the best one, the network fits the budget, and its parent's features teach it."""

import copy
import functools
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import omniconv
from omniconv.compress.prune.knapsack import (
    InnerDistillation,
    knapsack,
    knapsack_pruning,
    taylor_scores,
)
from omniconv.compress.structure.graph import trace_structure
from omniconv.testing.harness import randomize, seeded

SHAPE = (3, 24, 32)


@functools.cache
def traced():
    return trace_structure(omniconv.create_model("resnet8_small", num_classes=5), SHAPE)


def made():
    with seeded():
        model = randomize(omniconv.create_model("resnet8_small", num_classes=5)).eval()
        x, y = torch.randn(6, *SHAPE), torch.tensor([0, 1, 2, 3, 4, 0])
    return model, [lambda m, i=i: F.cross_entropy(m(x[i : i + 2]), y[i : i + 2]) for i in (0, 2, 4)], x


@pytest.mark.parametrize("seed", range(8))
def test_the_knapsack_is_the_best(seed):
    random = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 5, (4,), generator=random).tolist()
    values = {str(i): torch.rand(size, generator=random) for i, size in enumerate(sizes)}
    weights = {name: int(torch.randint(1, 30, (), generator=random)) for name in values}
    least = seed % 2
    capacity = least * sum(weights.values()) + int(torch.randint(0, 80, (), generator=random))
    keep = knapsack(values, weights, capacity, least=least)

    def total(masks):
        return sum(float(values[n][m].sum()) for n, m in masks.items())

    def used(masks):
        return sum(weights[n] * int(m.sum()) for n, m in masks.items())

    flat = [name for name, size in zip(values, sizes, strict=True) for _ in range(size)]
    best = 0.0
    for bits in itertools.product((False, True), repeat=len(flat)):
        parts = torch.tensor(bits).split(sizes)
        masks = dict(zip(values, parts, strict=True))
        if used(masks) <= capacity and all(int(m.sum()) >= least for m in parts):
            best = max(best, total(masks))
    assert used(keep) <= capacity
    assert all(int(m.sum()) >= least for m in keep.values())
    assert total(keep) == pytest.approx(best)


def test_taylor_scores_equal_sums_in_loops():
    model, losses, _ = made()
    structure = traced()
    scores = taylor_scores(model, structure, losses)
    terms = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for loss in losses:
        twin = copy.deepcopy(model)
        loss(twin).backward()
        for name, p in twin.named_parameters():
            terms[name] += (p * p.grad).abs().detach()
    for unit in (0, 7):
        block = "layer2.0."
        wanted = terms[block + "conv1.weight"][unit].sum() + terms[block + "conv2.weight"][:, unit].sum()
        wanted += terms[block + "bn1.weight"][unit] + terms[block + "bn1.bias"][unit]
        torch.testing.assert_close(scores[block + "conv1"][unit], wanted)


@pytest.mark.parametrize("of", ["macs", "parameters"])
def test_the_budget_is_met_and_used(of):
    model, losses, x = made()
    smaller, report = knapsack_pruning(model, SHAPE, losses, 0.6, of=of, structure=traced())
    share = getattr(report.after, of) / getattr(report.before, of)
    assert 0.39 <= share <= 0.4
    assert smaller(x).shape == (6, 5)
    whole, _ = knapsack_pruning(model, SHAPE, losses, 0.0, of=of, structure=traced())
    torch.testing.assert_close(whole(x), model(x))


def test_inner_distillation():
    model, losses, x = made()
    smaller, _ = knapsack_pruning(model, SHAPE, losses, 0.6, structure=traced())
    same = InnerDistillation(model, model, x)
    answer, distance = same(x)
    torch.testing.assert_close(answer, model(x))
    assert float(distance.detach()) == 0
    assert not same.maps
    pair = InnerDistillation(smaller, model, x, gamma=2.0)
    parent = {id(p) for p in model.parameters()}
    assert not parent & {id(p) for p in pair.parameters()}
    seen = {}
    for key, network in (("f", smaller), ("g", model)):
        for name in pair.layers:
            network.get_submodule(name).register_forward_hook(
                lambda _m, _i, out, key=(key, name): seen.update({key: out.detach().clone()})
            )
    wanted = [F.mse_loss(smaller(x), model(x))]
    for name in pair.layers:
        found = seen["f", name]
        if name.replace(".", "/") in pair.maps:
            found = torch.einsum("oc,nchw->nohw", pair.maps[name.replace(".", "/")].weight, found)
        wanted.append(F.mse_loss(found, seen["g", name]))
    torch.testing.assert_close(pair(x)[1], 2 * torch.stack(wanted).mean())
    pair(x)[1].backward()
    assert all(p.grad is not None for p in pair.maps.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_errors():
    model, losses, x = made()
    with pytest.raises(ValueError, match="capacity 3 is too small for 1 units of every group; raise it"):
        knapsack({"a": torch.ones(3)}, {"a": 4}, 3, least=1)
    with pytest.raises(ValueError, match="100% of macs cannot be removed: one unit of every group is"):
        knapsack_pruning(model, SHAPE, losses, 0.9999, structure=traced())
    with pytest.raises(ValueError, match="of must be macs or parameters: got 'units'"):
        knapsack_pruning(model, SHAPE, losses, of="units", structure=traced())
    with pytest.raises(ValueError, match="Conv2d has no feature_info: name layers to compare"):
        InnerDistillation(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), x)
