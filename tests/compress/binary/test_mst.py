import math

import numpy as np
import pytest
import torch
from scipy.sparse.csgraph import minimum_spanning_tree as scipy_tree
from scipy.sparse.csgraph import shortest_path
from torch import nn
from torch.nn import functional as F

from omniconv.compress.binary.conv import BinaryConv2d, binarize, sign
from omniconv.compress.binary.mst import (
    MSTConv2d,
    MSTLoss,
    hamming_distances,
    minimum_spanning_tree,
    mst_compress,
)
from omniconv.models.factory import create_model


def signs(channels: int, taps: int, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return 2 * torch.randint(2, (channels, taps), generator=random) - 1


def test_a_sign_passes_gradients_straight_through():
    x = torch.tensor([-2.0, -1.0, -0.0, 0.5, 1.5], requires_grad=True)
    y = sign(x)
    assert y.tolist() == [-1, -1, 1, 1, 1]
    y.backward(torch.arange(1.0, 6.0))
    assert x.grad.tolist() == [0, 2, 3, 4, 0]


def test_a_binary_convolution_is_one_of_signs():
    torch.manual_seed(0)
    conv = BinaryConv2d(3, 4, 3, stride=2, padding=1)
    x = torch.randn(2, 3, 7, 6)
    wanted = F.conv2d(x.sign(), conv.weight.sign(), conv.bias, 2, 1)
    assert torch.equal(conv(x), wanted)
    conv.binary_input = False
    assert torch.allclose(conv(x), F.conv2d(x, conv.weight.sign(), conv.bias, 2, 1))


def test_distances_count_what_differs():
    rows = signs(5, 11)
    wanted = [[sum(a != b for a, b in zip(r, s, strict=True)) for s in rows.tolist()] for r in rows.tolist()]
    assert hamming_distances(rows).tolist() == wanted


@pytest.mark.parametrize(("channels", "taps"), [(1, 5), (2, 5), (13, 4), (40, 27)])
def test_the_tree_is_minimal_and_its_root_least_deep(channels, taps):
    distances = hamming_distances(signs(channels, taps))
    tree = minimum_spanning_tree(distances)
    # scipy takes zeros for missing edges.
    assert tree.distance == scipy_tree(distances.numpy() + 1).sum() - (channels - 1)
    assert sum(int(distances[v, p]) for v, p in enumerate(tree.parents)) == tree.distance
    assert sorted(v for level in tree.levels for v in level) == list(range(channels))
    adjacency = np.zeros((channels, channels))
    for v, p in enumerate(tree.parents):
        adjacency[v, p] = v != p
    eccentricities = shortest_path(adjacency, directed=False, unweighted=True).max(1)
    assert tree.depth == eccentricities.min() == eccentricities[tree.root]


def test_of_equal_edges_the_tree_takes_those_near_its_root():
    # All distances are one: a star, not a path.
    assert minimum_spanning_tree(1 - torch.eye(9, dtype=torch.long)).depth == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"stride": 1, "padding": 1},
        {"stride": 2, "bias": False},
        {"padding": (2, 0), "dilation": (1, 2), "binary_input": False},
        {"padding": 1, "padding_mode": "circular"},
    ],
    ids=["plain", "strided", "real inputs", "circular"],
)
def test_the_tree_computes_the_convolution(settings):
    torch.manual_seed(0)
    conv = BinaryConv2d(5, 12, 3, **settings)
    x = torch.randn(2, 5, 9, 8)
    along = MSTConv2d(conv)
    if settings.get("binary_input", True) and "bias" in settings:
        assert torch.equal(along(x), conv(x))
    assert torch.allclose(along(x), conv(x), atol=1e-4)
    assert (
        sum(t.numel() * t.element_size() for t in along.state_dict().values()) <= math.ceil(12 * 45 / 8) + 48
    )


def test_stored_bits_fall_with_the_distance():
    conv = BinaryConv2d(4, 8, 3)
    with torch.no_grad():
        conv.weight.copy_(conv.weight[:1].expand_as(conv.weight))
    same = MSTConv2d(conv)
    # Equal channels: 36 bits of the root, and of each other one 3 of its parent and 6 that say 0.
    assert same.stored_bits == 36 + 7 * 9
    torch.manual_seed(0)
    assert MSTConv2d(BinaryConv2d(4, 8, 3)).stored_bits > same.stored_bits


def test_the_loss_pulls_children_to_their_parents():
    torch.manual_seed(0)
    model = nn.Sequential(BinaryConv2d(3, 6, 3), nn.ReLU(), BinaryConv2d(6, 8, 1))
    loss = MSTLoss(model, every=1)
    trees = [
        minimum_spanning_tree(hamming_distances(sign(m.weight).flatten(1))) for m in (model[0], model[2])
    ]
    wanted = sum(tree.distance for tree in trees) / (6 * 27 + 8 * 6)
    assert loss().item() == pytest.approx(wanted)
    optimizer = torch.optim.SGD(model.parameters(), 30.0)
    for _ in range(10):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.2 * wanted
    with pytest.raises(ValueError, match="model must have a BinaryConv2d without groups; see binarize"):
        MSTLoss(nn.Sequential(BinaryConv2d(4, 4, 1, groups=2)))


def test_a_binary_residual_network_is_compressed_and_gives_the_same():
    torch.manual_seed(0)
    model = create_model("resnet_test", num_classes=5)
    binary, _ = binarize(model)
    assert isinstance(binary.get_submodule("layer1.0.conv1"), BinaryConv2d)
    small, report = mst_compress(binary.eval())
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(small(x), binary(x), atol=1e-4)
    assert report.after.bytes < report.before.bytes / 3
    kept = sum(isinstance(m, MSTConv2d) for m in small.modules())
    assert kept == sum(isinstance(m, BinaryConv2d) for m in binary.modules()) == len(report.notes) - 1
    with pytest.raises(ValueError, match="layers: 'nothing' is no 2-d convolution"):
        binarize(model, layers=["nothing"])
    with pytest.raises(ValueError, match="conv must have no groups: got 2"):
        MSTConv2d(BinaryConv2d(4, 4, 1, groups=2))
