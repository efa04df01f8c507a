"""Stitchable networks: how many routes there are, what they compute, and the least-squares fit."""

import numpy as np
import pytest
import torch
from torch import nn

from omniconv.compress.adaptive.snnet import (
    Stitch,
    StitchableNetwork,
    paired_stitches,
    train_stitches,
    unpaired_stitches,
)
from omniconv.design.cost import count_cost
from omniconv.models.factory import create_model


def images(count: int = 6) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def vits(*dims: int, depth: int = 4) -> list[nn.Module]:
    torch.manual_seed(0)
    return [create_model("vit_test", num_classes=5, dim=dim, depth=depth).eval() for dim in dims]


def twins() -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        create_model("twins_test", num_classes=5, depths=depths, widths=widths).eval()
        for depths, widths in (((2, 2), (8, 16)), ((2, 5), (16, 32)))
    ]


def test_deit_has_34_stitches_a_pair_and_11_layers():
    pairs = paired_stitches(12)
    assert len({pair[:2] for pair in pairs}) == len(pairs) == 34
    assert all(abs(front - end) <= 1 for front, end, _ in pairs)
    assert {window for *_, window in pairs} == set(range(11))
    assert len(paired_stitches(12, kernel_size=1)) == 12
    assert len(paired_stitches(12, kernel_size=3, stride=2)) == len(
        {(i, j) for s in range(0, 12, 2) for i in range(s, min(s + 3, 12)) for j in range(s, min(s + 3, 12))}
    )


def test_unequal_depths_are_paired_by_place():
    assert unpaired_stitches(2, 6) == [(0, 1, 0), (0, 2, 0), (1, 3, 1), (1, 4, 1), (1, 5, 1)]
    assert unpaired_stitches(1, 1) == []


def test_the_fit_is_numpys_least_squares():
    random = torch.Generator().manual_seed(2)
    x, y = (torch.randn(3, c, 5, 4, generator=random) for c in (6, 9))
    x[:, 2] = 0  # a dead channel
    stitch = Stitch(6, 9)
    stitch.fit([(x, y)])
    rows = x.movedim(1, -1).reshape(-1, 6).double().numpy()
    rows = np.concatenate([rows, np.ones((len(rows), 1))], 1)
    wanted, *_ = np.linalg.lstsq(rows, y.movedim(1, -1).reshape(-1, 9).double().numpy(), rcond=None)
    np.testing.assert_allclose(stitch.fc.weight.detach().numpy(), wanted[:-1].T, atol=1e-6)
    np.testing.assert_allclose(stitch.fc.bias.detach().numpy(), wanted[-1], atol=1e-6)
    assert stitch(x).shape == y.shape


@pytest.mark.parametrize("make", [lambda: vits(16, 32, 48), twins], ids=["vit", "twins"])
@torch.no_grad()
def test_anchors_come_first_and_stay_as_they_are(make):
    anchors = make()
    network = StitchableNetwork(anchors, images()).eval()
    for index, anchor in enumerate(anchors):
        network.set_stitch(index)
        assert torch.equal(network(images()), anchor(images()))
        alone = network.extract(index)
        assert torch.equal(alone(images()), anchor(images()))
        assert sum(p.numel() for p in alone.parameters()) == sum(p.numel() for p in anchor.parameters())
    assert not {p.data_ptr() for p in network.parameters()} & {p.data_ptr() for p in anchors[0].parameters()}


@torch.no_grad()
def test_a_route_is_the_front_of_one_and_the_end_of_the_next():
    anchors = vits(16, 32)
    network = StitchableNetwork(anchors, images()).eval()
    assert len(network.routes) == 2 + 10
    for index, route in list(enumerate(network.routes))[2::4]:
        network.set_stitch(index)
        wanted = anchors[0].patch_embed(images()).flatten(1, 2) + anchors[0].pos_embed
        for block in anchors[0].blocks[: route.leave - 1]:  # the steps before are embed and join
            wanted = block(wanted)
        wanted = network.stitches[route.stitch](wanted)
        for block in anchors[1].blocks[route.enter - 2 :]:
            wanted = block(wanted)
        wanted = anchors[1].forward_head(anchors[1].norm(wanted).transpose(1, 2))
        torch.testing.assert_close(network(images()), wanted)
        torch.testing.assert_close(network.extract(index)(images()), wanted)


@torch.no_grad()
def test_stitches_of_stages_cost_what_lies_between_their_anchors():
    anchors = twins()
    network = StitchableNetwork(anchors, images())
    costs = {index: macs for macs, index in network.costs((3, 32, 32))}
    assert [costs[0], costs[1]] == [count_cost(anchor, (3, 32, 32)).macs for anchor in anchors]
    assert all(costs[0] < costs[index] < costs[1] for index in range(2, len(network.routes)))
    for index in (0, len(costs) - 1):
        small = network.extract(index)
        assert small.costs((3, 32, 32)) == [(costs[index], 0)]
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("distilled", [False, True])
def test_joint_training_moves_every_part(distilled):
    network = StitchableNetwork(vits(16, 32, depth=2), images()).train()
    before = [p.clone() for p in network.parameters()]
    labels = torch.arange(6) % 5
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    teacher = network.anchors[1] if distilled else None
    train_stitches(network, [(images(), labels)] * 15, optimizer, teacher=teacher)
    assert all(not torch.equal(p, q) for p, q in zip(network.parameters(), before, strict=True))
    assert network.current == 0


def test_errors():
    small, large = vits(16, 32)
    with pytest.raises(ValueError, match="anchors must be at least two networks: got 1"):
        StitchableNetwork([small], images())
    with pytest.raises(ValueError, match="anchors must go from cheap to dear"):
        StitchableNetwork([large, small], images())
    with pytest.raises(ValueError, match="anchors must have the same stages: got 1 and 2"):
        StitchableNetwork([small, twins()[1]], images())
    other = create_model("vit_test", num_classes=5, dim=48, depth=4, patch_size=2)
    with pytest.raises(ValueError, match="feature maps of the anchors must have the same size"):
        StitchableNetwork([small, other], images())
    with pytest.raises(ValueError, match="no block of anchor 0 can be left for anchor 1: take other depths"):
        StitchableNetwork([small, create_model("vit_test", num_classes=5, dim=96, depth=2)], images())
    with pytest.raises(ValueError, match=r"index must lie in \[0, 12\): got 12"):
        StitchableNetwork([small, large], images()).set_stitch(12)
