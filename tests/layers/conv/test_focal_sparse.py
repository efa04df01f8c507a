"""Focal sparse convolution against a loop over sites, its dense form, and its two limits."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from omniconv.layers.conv.focal_sparse import FocalConv1d, FocalConv2d, FocalConv3d
from omniconv.layers.conv.sparse import active_sites
from omniconv.ops.sparse_conv.tensor import SparseTensor

SHAPES = {1: (13,), 2: (8, 7), 3: (5, 6, 7)}


def draw(axes, share=0.15):
    torch.manual_seed(axes)
    return torch.randn(2, 3, *SHAPES[axes]).double() * (torch.rand(2, 1, *SHAPES[axes]) < share)


def grow_slowly(x, importance, kernel, threshold):
    """Return site -> (multiplier, row) of the grown map."""
    offsets = list(itertools.product(*(range(-(k // 2), k // 2 + 1) for k in kernel)))
    grown = {tuple(site): [[], row] for row, site in enumerate(x.coordinates.tolist())}
    foreground = set()
    for row, (batch, *position) in enumerate(x.coordinates.tolist()):
        if importance[row, len(offsets) // 2] <= threshold:
            continue
        foreground.add((batch, *position))
        for tap, offset in enumerate(offsets):
            place = [p + o for p, o in zip(position, offset, strict=True)]
            if not all(0 <= p < size for p, size in zip(place, x.shape, strict=True)):
                continue
            if not any(offset):
                grown[batch, *position][0].append(1.0)
            elif importance[row, tap] >= threshold:
                grown.setdefault((batch, *place), [[], None])[0].append(float(importance[row, tap]))
    return {
        site: (sum(votes) / len(votes) if site in foreground else 1.0, row)
        for site, (votes, row) in grown.items()
    }


@pytest.mark.parametrize(
    ("kind", "kernel"), [(FocalConv1d, (5,)), (FocalConv2d, (3, 5)), (FocalConv3d, (3, 3, 3))]
)
def test_grows_as_a_loop_over_sites_does(kind, kernel):
    layer = kind(3, 4, kernel, threshold=0.55).double()
    x = SparseTensor.from_dense(draw(len(kernel)))
    logits = torch.randn(len(x.features), len(layer.predictor.weight)).double()
    grown = layer.grow(x, logits)
    wanted = grow_slowly(x, logits.sigmoid(), kernel, 0.55)
    assert [tuple(site) for site in grown.coordinates.tolist()] == sorted(wanted)
    assert len(wanted) > len(x.features)
    for site, features in zip(grown.coordinates.tolist(), grown.features, strict=True):
        scale, row = wanted[tuple(site)]
        expected = torch.zeros(3).double() if row is None else scale * x.features[row]
        torch.testing.assert_close(features, expected)


@pytest.mark.parametrize("kind", [FocalConv1d, FocalConv2d, FocalConv3d])
def test_sparse_equals_dense(kind):
    layer = kind(3, 4).double()
    x = draw(layer.conv.axes)
    sparse, dense = layer(SparseTensor.from_dense(x)), layer(x)
    torch.testing.assert_close(sparse.dense(), dense)
    assert len(sparse.coordinates) == int(active_sites(dense).sum())
    leaves = list(layer.parameters())
    probe = torch.randn_like(dense)
    wanted = torch.autograd.grad((dense * probe).sum(), leaves)
    for got, want in zip(torch.autograd.grad((sparse.dense() * probe).sum(), leaves), wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_importance_1_is_regular_and_0_is_submanifold():
    layer, x = FocalConv3d(3, 4, bias=False).double(), draw(3)
    dense = F.conv3d(x, layer.conv.weight, padding=1)
    sparse = SparseTensor.from_dense(x)
    logits = layer.importance(sparse)
    for value, wanted in ((50.0, dense), (-50.0, dense * active_sites(x))):
        y = layer(sparse, logits.replace(torch.full_like(logits.features, value)))
        torch.testing.assert_close(y.dense(), wanted)


def test_the_task_trains_the_predictor():
    layer = FocalConv2d(3, 4).double()
    layer(SparseTensor.from_dense(draw(2))).features.square().sum().backward()
    gradient = layer.predictor.weight.grad
    centre = len(gradient) // 2
    assert gradient[:centre].abs().max() > 1e-4
    assert gradient[centre].abs().max() == 0, "the centre decides and does not weigh"
