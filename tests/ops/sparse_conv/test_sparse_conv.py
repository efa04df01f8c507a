"""Sparse convolution against torch's dense one, and kernel maps against a dictionary of sites."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from omniconv.ops.dispatch import explain
from omniconv.ops.sparse_conv.api import sparse_conv
from omniconv.ops.sparse_conv.maps import kernel_map, output_shape, output_sites, unique_sites
from omniconv.ops.sparse_conv.tensor import SparseTensor

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CALLS = [
    ((11,), (4,), (3,), (2,), (1,)),
    ((9, 7), (3, 2), (2, 1), (1, 3), (1, 2)),
    ((6, 5, 7), (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1)),
    ((6, 5, 7), (3, 1, 2), (2, 1, 3), (0, 2, 1), (1, 1, 2)),
]


def draw(shape, share=0.15):
    return torch.randn(2, 3, *shape).double() * (torch.rand(2, 1, *shape) < share)


@pytest.mark.parametrize("impl", ["torch", "pairs"])
@pytest.mark.parametrize(("shape", "kernel", "stride", "padding", "dilation"), CALLS)
def test_equals_the_dense_convolution(shape, kernel, stride, padding, dilation, impl):
    torch.manual_seed(0)
    dense, weight = draw(shape), torch.randn(4, 3, *kernel).double()
    sizes = (kernel, stride, padding, dilation)
    x = SparseTensor.from_dense(dense)
    sites = output_sites(x.coordinates, x.shape, *sizes)
    features = sparse_conv(x.features, weight, kernel_map(x.coordinates, sites, x.shape, *sizes), impl=impl)
    y = SparseTensor(features, sites, output_shape(x.shape, *sizes), 2)
    torch.testing.assert_close(y.dense(), CONV[len(shape)](dense, weight, None, stride, padding, dilation))


@pytest.mark.parametrize(("shape", "kernel", "stride", "padding", "dilation"), CALLS)
def test_sites_and_maps_are_those_of_a_loop(shape, kernel, stride, padding, dilation):
    torch.manual_seed(1)
    x = SparseTensor.from_dense(draw(shape))
    sizes = (kernel, stride, padding, dilation)
    rows = {tuple(site): row for row, site in enumerate(x.coordinates.tolist())}
    seen = {}
    for batch, *o in itertools.product(range(2), *(range(size) for size in output_shape(shape, *sizes))):
        found = []
        for tap in itertools.product(*(range(k) for k in kernel)):
            place = (
                a * s + u * d - p for a, s, u, d, p in zip(o, stride, tap, dilation, padding, strict=True)
            )
            found.append(rows.get((batch, *place), -1))
        if max(found) >= 0:
            seen[batch, *o] = found
    sites = output_sites(x.coordinates, shape, *sizes)
    assert [tuple(site) for site in sites.tolist()] == list(seen)
    assert kernel_map(x.coordinates, sites, shape, *sizes).tolist() == list(seen.values())


def test_rows_may_come_in_any_order():
    torch.manual_seed(2)
    x = SparseTensor.from_dense(draw((6, 7)))
    order = torch.randperm(len(x.coordinates))
    sizes = ((3, 3), (1, 1), (1, 1), (1, 1))
    table = kernel_map(x.coordinates[order], x.coordinates, x.shape, *sizes)
    wanted = kernel_map(x.coordinates, x.coordinates, x.shape, *sizes)
    torch.testing.assert_close(torch.where(table < 0, -1, order[table]), wanted)


def test_an_empty_map_gives_an_empty_map():
    x = SparseTensor.from_dense(torch.zeros(2, 3, 5, 4))
    sizes = ((3, 3), (1, 1), (1, 1), (1, 1))
    sites = output_sites(x.coordinates, x.shape, *sizes)
    table = kernel_map(x.coordinates, sites, x.shape, *sizes)
    assert table.shape == (0, 9)
    for impl in ("torch", "pairs"):
        y = sparse_conv(x.features, torch.ones(4, 3, 3, 3), table, impl=impl)
        assert y.shape == (0, 4)


def test_dense_and_back():
    x = draw((5, 4, 3))
    sparse = SparseTensor.from_dense(x)
    torch.testing.assert_close(sparse.dense(), x)
    assert len(sparse.coordinates) == int((x != 0).any(1).sum())


def test_unique_sites():
    sites = torch.tensor([[1, 0, 2], [0, 3, 1], [1, 0, 2], [0, 3, 0]])
    unique, which = unique_sites(sites, (4, 3))
    assert unique.tolist() == [[0, 3, 0], [0, 3, 1], [1, 0, 2]]
    torch.testing.assert_close(unique[which], sites)


def test_auto_avoids_multiplying_zeros_in_large_maps():
    x, weight = torch.empty(50000, 32), torch.empty(32, 32, 3, 3, 3)
    assert explain(sparse_conv, x, weight, torch.zeros(50000, 27, dtype=torch.int64)).chosen == "pairs"
    assert explain(sparse_conv, x[:50], weight, torch.zeros(50, 27, dtype=torch.int64)).chosen == "torch"


def test_wrong_coordinates_are_refused():
    with pytest.raises(ValueError, match=r"coordinates must be int64: got torch\.float32"):
        SparseTensor(torch.ones(2, 3), torch.ones(2, 3), (4, 4), 1)
    with pytest.raises(ValueError, match=r"coordinates \(P, 3\): got \(2, 3\) and \(3, 3\)"):
        SparseTensor(torch.ones(2, 3), torch.ones(3, 3).long(), (4, 4), 1)
    with pytest.raises(ValueError, match=r"the kernel \(5,\) does not fit into maps of \(3,\)"):
        output_shape((3,), (5,), (1,), (0,), (1,))
    with pytest.raises(ValueError, match=r"neighbours must be int64: got torch\.float32"):
        sparse_conv(torch.ones(2, 3), torch.ones(1, 3, 1), torch.zeros(2, 1))
