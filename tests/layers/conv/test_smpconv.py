"""SMPConv against loops over nodes and points, and the properties of a kernel that is a function."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from omniconv.layers.conv.smpconv import RepSMPConv2d, SMPConv1d, SMPConv2d, SMPConv3d, smp_parameter_groups


def slow_kernel(layer, size: int) -> np.ndarray:
    """Node by node, point by point."""
    position, radius, weight = (p.detach().numpy() for p in (layer.position, layer.radius, layer.weight))
    axes = position.shape[1]
    kernel = np.zeros((len(weight), *(size,) * axes))
    for node in itertools.product(range(size), repeat=axes):
        u = np.array([-1 + 2 * n / (size - 1) for n in node])
        active = 0
        for i, p in enumerate(position):
            bump = 1 - np.abs(u - p).sum() / min(max(radius[i], 1e-3), 1.0)
            if bump > 0:
                active += 1
                kernel[(slice(None), *node)] += weight[:, i] * bump
        if layer.average and active:
            kernel[(slice(None), *node)] /= active
    return kernel


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("make", [SMPConv1d, SMPConv2d, SMPConv3d])
def test_kernels_are_sums_of_bumps(make, average):
    torch.manual_seed(0)
    layer = make(3, 5, 9, average=average, std=0.6, dtype=torch.float64)
    nn.init.uniform_(layer.radius, -0.1, 1.5)
    for size in (5, 6):
        np.testing.assert_allclose(layer.kernel(size).detach().numpy(), slow_kernel(layer, size), atol=1e-6)


def test_images_are_correlated_with_the_kernel():
    torch.manual_seed(0)
    layer = SMPConv2d(4, 7).double()
    x = torch.randn(2, 4, 9, 6, dtype=torch.float64)
    expected = nn.functional.conv2d(x, layer.kernel()[:, None], padding=3, groups=4)
    torch.testing.assert_close(layer(x), expected)


def test_causal_sequences_see_lag_zero_at_the_first_node():
    torch.manual_seed(0)
    layer = SMPConv1d(2, 6, 8, causal=True, std=0.5).double()
    kernel, x = layer.kernel(), torch.randn(1, 2, 9, dtype=torch.float64)
    expected = torch.zeros_like(x)
    for t in range(9):
        for lag in range(min(6, t + 1)):
            expected[..., t] += kernel[:, lag] * x[..., t - lag]
    torch.testing.assert_close(layer(x), expected)


def test_causal_points_begin_near_the_present():
    torch.manual_seed(0)
    layer = SMPConv1d(1, 100, 2000, causal=True, std=0.1)
    lags = (layer.position.detach() + 1) / 2
    # Lags are those of a half normal distribution, whose mean is std sqrt(2 / pi).
    assert lags.min() >= 0
    assert abs(float(lags.mean()) - 0.1 * (2 / np.pi) ** 0.5) < 0.01


def test_a_point_moved_by_one_node_moves_the_kernel():
    torch.manual_seed(0)
    layer = SMPConv2d(3, 15, 6, std=0.1, dtype=torch.float64)
    before = layer.kernel()
    with torch.no_grad():
        layer.position[:, 1] += 2 / 14
    torch.testing.assert_close(layer.kernel()[:, :, 1:], before[:, :, :-1])
    assert before.abs().max() > 0


def test_a_finer_grid_shares_its_nodes_exactly():
    for make in (SMPConv1d, SMPConv2d):
        layer = make(3, 13, 20)
        fine = layer.kernel(25)[(slice(None), *(slice(None, None, 2),) * layer.axes)]
        assert torch.equal(fine, layer.kernel())


@pytest.mark.parametrize(("size", "channels"), [(31, 96), (13, 768)])
def test_parameters_do_not_depend_on_the_size(size, channels):
    points = size**2 // 4
    count = sum(p.numel() for p in SMPConv2d(channels, size).parameters())
    assert count == points * (channels + 2 + 1)
    assert count == sum(p.numel() for p in SMPConv2d(channels, 5, points).parameters())


def test_groups_hold_every_parameter_once():
    model = nn.Sequential(SMPConv2d(4, 5), nn.Conv2d(4, 2, 1), SMPConv2d(2, 7))
    groups = smp_parameter_groups(model, 1e-3, 0.05)
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    assert [len(group["params"]) for group in groups] == [4, 2, 2]
    assert groups[2]["lr"] == pytest.approx(1e-4)
    torch.optim.AdamW(groups)


def test_the_small_branch_adds_to_the_middle_of_the_large_one():
    torch.manual_seed(0)
    layer = RepSMPConv2d(3, 9, 3).double()
    for _ in range(3):
        layer(torch.randn(4, 3, 8, 8, dtype=torch.float64) * 2 + 1)
    layer.eval()
    merged = layer.merged()
    x = torch.randn(1, 3, 11, 6, dtype=torch.float64)
    torch.testing.assert_close(merged(x), layer(x))
    assert merged.weight.shape == (3, 1, 9, 9)
