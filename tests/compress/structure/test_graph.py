"""The structure graph: what is removed was coupled, sizes and counts come out as predicted, networks still run."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import omniconv
from omniconv.compress.structure.graph import trace_structure
from omniconv.design.cost import count_cost
from omniconv.layers.attention.self_attention import SelfAttention
from omniconv.models.factory import list_models
from omniconv.testing.harness import randomize, seeded

SHAPE = (3, 64, 96)


def draw_keep(structure, share=0.6):
    """Return masks that keep units at random, other numbers in every group."""
    keep = {}
    for name, group in structure.groups.items():
        keep[name] = torch.rand(group.size) < share
        keep[name][0] = True
    return keep


class Residual(nn.Module):
    """A sum, a concatenation, a depthwise and a grouped convolution."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 6, 1)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.up = nn.Conv2d(6, 8, 1)
        self.grouped = nn.Conv2d(14, 14, 3, padding=1, groups=7)
        self.head = nn.Linear(14 * 4, 5)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        inner = self.depthwise(self.down(x)).relu()
        x = torch.cat((x + self.up(inner), inner), 1)
        return self.head(F.adaptive_avg_pool2d(self.grouped(x), 2).flatten(1))


def places(group):
    return {(part.name, part.dim) for part in group.slices}


def test_coupled_channels_are_one_group():
    """Worked out by hand: pairs of channels share a group of the grouped convolution, here across the seam."""
    structure = trace_structure(Residual(), (3, 16, 24))
    # stem, norm and up are one by their sum, and pairs of them by the groups: units of 2 channels, 4 of them.
    groups = {frozenset(places(group)): group for group in structure.groups.values()}
    stream = next(group for key, group in groups.items() if ("stem.weight", 0) in key)
    assert stream.size == 4
    assert {("stem.bias", 0), ("norm.running_var", 0), ("down.weight", 1), ("up.weight", 0)} < places(stream)
    assert {("grouped.weight", 0), ("head.weight", 1)} < places(stream)
    inner = next(group for key, group in groups.items() if ("down.weight", 0) in key)
    assert inner.size == 3
    assert {("depthwise.weight", 0), ("depthwise.bias", 0), ("up.weight", 1)} < places(inner)
    head = next(part for part in stream.slices if part.name == "head.weight")
    assert head.index[head.owner == 1].tolist() == list(range(8, 16))


def test_removed_equals_masked():
    with seeded():
        model = randomize(Residual()).eval()
        structure = trace_structure(model, (3, 16, 24))
        keep = draw_keep(structure)
        x = torch.randn(2, 3, 16, 24)
    smaller = structure.remove(model, keep)
    assert smaller.grouped.groups == int(keep["stem"].sum() + keep["down"].sum())
    assert smaller.stem.out_channels == smaller.norm.num_features == 2 * int(keep["stem"].sum())
    torch.testing.assert_close(smaller(x), structure.mask(model, keep)(x), rtol=1e-5, atol=1e-5)


# In other networks norms over channels or convolutions across them make a removed channel differ from a zero one.
@pytest.mark.parametrize(
    "name",
    ["mobilenetv2_test", "densenet_test", "inception_v3_test", "osnet_test", "resnext_test", "halonet_test"],
)
def test_removed_equals_masked_in_networks(name):
    with seeded():
        model = randomize(omniconv.create_model(name)).eval()
        structure = trace_structure(model, SHAPE)
        keep = draw_keep(structure)
        x = torch.randn(2, *SHAPE)
    with torch.no_grad():
        wanted = structure.mask(model, keep)(x)
        torch.testing.assert_close(
            structure.remove(model, keep)(x), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max())
        )


@pytest.mark.parametrize("name", list_models("*_test"))
def test_every_family_loses_channels(name):
    """Random units go from every family of networks: it runs and is as large as predicted."""
    model = omniconv.create_model(name)
    with seeded():
        structure = trace_structure(model, SHAPE)
        keep = draw_keep(structure)
    smaller = structure.remove(model, keep)
    cost = count_cost(smaller, SHAPE)
    assert structure.parameters(keep) == cost.parameters < count_cost(model, SHAPE).parameters
    assert structure.macs({}) == count_cost(model, SHAPE).macs
    assert structure.macs(keep) == pytest.approx(cost.macs, rel=1e-4)
    assert len(structure.fixed) <= 4
    maps = smaller.eval().forward_stages(torch.zeros(1, *SHAPE))
    assert [m.shape[1] for m in maps] == smaller.feature_info.channels()


def test_heads_as_many_as_they_are_wide():
    """Of 4 heads of 4 features each, whole heads go, and the layer's count of heads follows."""
    model = nn.Sequential(SelfAttention(16, 4), nn.Linear(16, 5)).double().eval()
    structure = trace_structure(model, (7, 16))
    (heads,) = [group for group in structure.groups.values() if group.size == 4]
    keep = {heads.name: torch.tensor([True, False, True, True])}
    smaller = structure.remove(model, keep)
    assert smaller[0].num_heads == 3
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    torch.testing.assert_close(smaller(x), structure.mask(model, keep)(x))


class NotBoth(nn.Module):
    """Either of two layers may be narrow."""

    def __init__(self):
        super().__init__()
        self.one, self.two = (nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)) for _ in range(2))

    def forward(self, x):
        if self.one[0].out_channels + self.two[0].out_channels < 10:
            raise RuntimeError("too narrow")
        return self.one(x) - self.two(x)


def test_groups_that_only_fail_together_are_held():
    structure = trace_structure(NotBoth(), (3, 10, 12))
    assert structure.fixed == {"two.0": "too narrow"}
    assert "one.0" in structure.groups


def test_circular_borders_do_not_untie():
    layers = (
        nn.Conv2d(3, 6, 1),
        nn.Conv2d(6, 6, 3, padding=1, padding_mode="circular", groups=6),
        nn.Conv2d(6, 4, 1),
    )
    model = nn.Sequential(*layers).eval()
    structure = trace_structure(model, (3, 10, 12))
    keep = {"0": torch.arange(6) % 3 > 0}
    x = torch.randn(1, 3, 10, 12)
    assert not structure.fixed
    torch.testing.assert_close(structure.remove(model, keep)(x), structure.mask(model, keep)(x))


def test_what_cannot_go_stays():
    model = Residual()
    structure = trace_structure(model, (3, 16, 24))
    touched = {(part.name, part.dim) for group in structure.groups.values() for part in group.slices}
    assert ("stem.weight", 1) not in touched
    assert ("head.weight", 0) not in touched


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_all_channels_that_read_an_image_can_go(channels):
    model = nn.Sequential(nn.Conv2d(channels, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 1))
    assert trace_structure(model, (channels, 16, 24)).groups["0"].size == 6


def test_wrong_masks_are_refused():
    structure = trace_structure(Residual(), (3, 16, 24))
    for keep, words in (
        ({"steam": torch.ones(4, dtype=torch.bool)}, "no group 'steam'"),
        ({"stem": torch.ones(3, dtype=torch.bool)}, "must be 4 booleans"),
        ({"stem": torch.zeros(4, dtype=torch.bool)}, "keep at least one unit"),
    ):
        with pytest.raises(ValueError, match=words):
            structure.remove(Residual(), keep)


def test_scores_are_summed_over_all_that_goes():
    structure = trace_structure(Residual(), (3, 16, 24))
    ones = {name: torch.ones_like(value) for name, value in Residual().named_parameters()}
    # down: 2 x 8 weights and 2 biases a unit; depthwise 2 x 9 + 2; up 2 x 8; grouped 2 x 2 x 9 + 2; head 5 x 8.
    assert structure.scores(ones)["down"].tolist() == [16 + 2 + 18 + 2 + 16 + 36 + 2 + 40] * 3


def test_a_model_that_does_not_run_is_named():
    with pytest.raises(ValueError, match="does not run on an input of"):
        trace_structure(Residual(), (4, 16, 24))
