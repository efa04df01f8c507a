"""PLeaS: permuted twins merge into themselves, networks side by side stay exact, and what is shared is fitted."""

import copy

import pytest
import torch
from torch import nn

import omniconv
from omniconv.compress.merge.matching import lay_out, match_units, merge_units
from omniconv.compress.merge.pleas import choose_shared, fit_layers, pleas, separable
from omniconv.compress.report import weight_layers
from omniconv.compress.structure.graph import trace_structure
from omniconv.design.cost import count_cost, layer_macs
from omniconv.testing.harness import randomize, seeded

SHAPE = (3, 12, 16)


class Small(nn.Module):
    """A residual sum, a depthwise and a grouped convolution, batch norms, a flattened map before the classifier."""

    def __init__(self, classes=5):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.Conv2d(8, 12, 1, bias=False)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=2, dilation=2, groups=12)
        self.grouped = nn.Conv2d(12, 6, 3, padding=1, groups=3)
        self.down = nn.Conv2d(6, 8, 1)
        self.head = nn.Linear(8 * 4, classes)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = x + self.down(self.grouped(self.depthwise(self.up(x)).relu()).relu())
        return self.head(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


def permuted(model, structure):
    """Return the same function with its units in another order, and the orders."""
    twin, orders = copy.deepcopy(model), {}
    state = twin.state_dict()
    for name, group in structure.groups.items():
        orders[name] = torch.randperm(group.size)
        for part in group.slices:
            value = state[part.name].clone()
            for new, old in enumerate(orders[name].tolist()):
                to, of = (part.index[part.owner == unit] for unit in (new, old))
                state[part.name].index_copy_(part.dim, to, value.index_select(part.dim, of))
    return twin, orders


@pytest.fixture(scope="module")
def setting():
    with seeded():
        model, other = randomize(Small()).eval(), randomize(Small()).eval()
        return model, other, trace_structure(model, SHAPE), [torch.randn(24, *SHAPE) for _ in range(2)]


def test_a_permuted_twin_is_recovered(setting):
    model, _, structure, batches = setting
    with seeded():
        twin, orders = permuted(model, structure)
    x = batches[0]
    torch.testing.assert_close(twin(x), model(x), rtol=1e-4, atol=1e-4)
    matches = match_units(model, twin, structure, batches)
    for name, order in orders.items():
        assert order[matches[name].order].equal(torch.arange(len(order)))
    merged, _ = pleas(model, twin, batches, SHAPE, structure=structure)
    torch.testing.assert_close(merged(x), model(x), rtol=1e-4, atol=1e-4)
    for budget in (1.3, 2.0):
        wide, _ = pleas(model, twin, batches, SHAPE, budget, structure=structure)
        torch.testing.assert_close(wide(x), model(x), rtol=1e-4, atol=1e-4)


def test_side_by_side_is_exact(setting):
    model, _, structure, batches = setting
    with seeded():
        other = randomize(Small(classes=4)).eval()
    x = batches[0]
    merged, _ = pleas(model, other, batches, SHAPE, 2.0, heads=["head"], structure=structure)
    torch.testing.assert_close(merged(x), torch.cat((model(x), other(x)), 1), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="name its layer in heads"):
        pleas(model, other, batches, SHAPE)


def test_every_layer_is_the_least_squares_solution(setting):
    """Against a solver of torch, for a layer with groups, dilation and padding: patches by a unit kernel each."""
    model, other, structure, batches = setting
    matches = match_units(model, other, structure, batches)
    axes = lay_out(model, other, structure, matches, {})
    merged = merge_units(model, other, axes)
    before = copy.deepcopy(merged)
    fit_layers(merged, model, other, axes, batches, ridge=1e-9)
    calls = [{}, {}]
    for network, seen in zip((model, other), calls, strict=True):
        hook = network.grouped.register_forward_hook(
            lambda m, args, out, seen=seen: seen.update(x=args[0].detach(), y=out.detach())
        )
        network(torch.cat(batches))
        hook.remove()
    order_in, order_out = (axes["grouped.weight", 0].second, axes["grouped.weight", 0].second)
    group = order_out[::2] // 2
    order_in = (group[:, None] * 4 + torch.arange(4)).flatten()
    x = (calls[0]["x"] + calls[1]["x"][:, order_in]) / 2
    y = (calls[0]["y"] + calls[1]["y"][:, order_out]) / 2
    for g in range(3):
        patches = nn.functional.unfold(x[:, 4 * g : 4 * g + 4], 3, padding=1).mT.flatten(0, 1)
        patches = torch.cat((patches, torch.ones(len(patches), 1)), 1)
        wanted = torch.linalg.lstsq(patches, y[:, 2 * g : 2 * g + 2].movedim(1, -1).flatten(0, -2)).solution
        rows = slice(2 * g, 2 * g + 2)
        got = torch.cat((merged.grouped.weight[rows].flatten(1), merged.grouped.bias[rows, None]), 1)
        torch.testing.assert_close(got.mT, wanted, rtol=1e-2, atol=1e-3)
    assert not torch.allclose(merged.grouped.weight, before.grouped.weight, atol=1e-2)


def test_a_unit_reads_none_of_the_others_alone(setting):
    model, other, structure, batches = setting
    matches = match_units(model, other, structure, batches)
    axes = lay_out(model, other, structure, matches, {"stem": 5, "up": 2})
    merged = merge_units(model, other, axes)
    fit_layers(merged, model, other, axes, batches)
    assert merged.stem.out_channels == 2 * 8 - 5
    assert merged.up.out_channels == 2 * 12 - 2 * 4
    read, write = axes["up.weight", 1], axes["up.weight", 0]
    weight = merged.up.weight.detach()[..., 0, 0]
    only_ours, only_theirs = (write.second < 0, write.first < 0)
    assert not weight[only_ours][:, read.first < 0].any()
    assert not weight[only_theirs][:, read.second < 0].any()
    assert weight[only_ours][:, read.second < 0].all()


def test_the_budget_is_kept_and_used():
    model = Small()
    structure = trace_structure(model, SHAPE)
    gains = {name: 1.0 + i for i, name in enumerate(structure.groups)}
    one = count_cost(model, SHAPE).macs
    with seeded():
        other = randomize(Small())
    matches = match_units(model, other, structure, [torch.randn(4, *SHAPE)])
    for budget in (1.25, 1.6):
        shared = choose_shared(model, structure, gains, budget)
        axes = lay_out(model, other, structure, matches, shared)
        # Count the multiply-adds that are not with zeros, layer by layer.
        merged = merge_units(randomize(model), other, axes)
        layers = weight_layers(merged)
        each = layer_macs(merged, SHAPE)
        macs = sum(
            each[name] * int(layer.weight.count_nonzero()) / layer.weight.numel()
            for name, layer in layers.items()
        )
        assert 0.85 * budget < macs / one <= budget


def test_heads_of_attention_are_never_put_side_by_side():
    model = omniconv.create_model("deit_test")
    structure = trace_structure(model, (3, 48, 48))
    with seeded():
        names = separable(randomize(model), structure, torch.randn(1, 3, 48, 48))
    assert names == ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1"]


def test_what_cannot_be_is_refused(setting):
    model, other, _, batches = setting
    with pytest.raises(ValueError, match=r"budget must lie in \[1, 2\]: got 3"):
        pleas(model, other, batches, SHAPE, 3)
    with pytest.raises(ValueError, match="batches must hold inputs"):
        pleas(model, other, [], SHAPE)
