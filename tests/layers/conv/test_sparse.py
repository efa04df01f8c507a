"""Sparse layers give what they give for the same map as a dense one, and what torch gives where that is active."""

import pytest
import torch
from torch.nn import functional as F

from omniconv.layers.conv.sparse import (
    SparseConv1d,
    SparseConv2d,
    SparseConv3d,
    SubmanifoldConv1d,
    SubmanifoldConv2d,
    SubmanifoldConv3d,
    active_sites,
)
from omniconv.ops.sparse_conv.tensor import SparseTensor

SHAPES = {1: (13,), 2: (9, 7), 3: (5, 6, 7)}


def draw(axes, channels=3):
    torch.manual_seed(axes)
    x = torch.randn(2, channels, *SHAPES[axes]) * (torch.rand(2, 1, *SHAPES[axes]) < 0.2)
    return x.double()


@pytest.mark.parametrize(
    ("kind", "kwargs"),
    [
        (SubmanifoldConv1d, {"kernel_size": 5}),
        (SubmanifoldConv2d, {"kernel_size": (3, 5), "dilation": (2, 1)}),
        (SubmanifoldConv3d, {"bias": False}),
        (SparseConv1d, {"kernel_size": 4, "stride": 2}),
        (SparseConv2d, {"stride": (1, 3), "padding": (2, 1), "dilation": 2}),
        (SparseConv3d, {"padding": 1}),
    ],
)
def test_sparse_equals_dense(kind, kwargs):
    layer = kind(3, 4, **kwargs).double()
    x = draw(kind.axes).requires_grad_()
    dense, sparse = layer(x), layer(SparseTensor.from_dense(x))
    torch.testing.assert_close(sparse.dense(), dense)
    assert sparse.shape == dense.shape[2:]
    probe = torch.randn_like(dense)
    leaves = [*layer.parameters()]
    wanted = torch.autograd.grad((dense * probe).sum(), leaves)
    for got, want in zip(torch.autograd.grad((sparse.dense() * probe).sum(), leaves), wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_submanifold_is_the_dense_convolution_at_the_active_sites():
    layer, x = SubmanifoldConv3d(3, 4).double(), draw(3)
    wanted = F.conv3d(x, layer.weight, layer.bias, padding=1) * active_sites(x)
    torch.testing.assert_close(layer(SparseTensor.from_dense(x)).dense(), wanted)


def test_regular_without_bias_is_the_dense_convolution():
    layer, x = SparseConv3d(3, 4, stride=2, padding=1, bias=False).double(), draw(3)
    torch.testing.assert_close(
        layer(SparseTensor.from_dense(x)).dense(), F.conv3d(x, layer.weight, stride=2, padding=1)
    )


def test_layers_at_the_same_sites_share_a_map():
    x = SparseTensor.from_dense(draw(2))
    y = SubmanifoldConv2d(4, 5, dtype=torch.float64)(SubmanifoldConv2d(3, 4, dtype=torch.float64)(x))
    assert len(x.maps) == 1
    assert y.maps is x.maps
    SubmanifoldConv2d(3, 4, 5, dtype=torch.float64)(x)
    assert len(x.maps) == 2
