import math

import numpy as np
import pytest
import torch
from torch import nn

from omniconv.compress.quantize.kmeans import kmeans, nearest
from omniconv.compress.quantize.lr2vq import (
    LowRankLayer,
    VectorQuantizedLayer,
    estimate_rank,
    low_rank,
    low_rank_factors,
    lr2vq,
    subvectors,
)
from omniconv.core.weights import save_weights
from omniconv.models.factory import create_model


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_clusters_are_found_and_are_a_fixed_point():
    middles = torch.tensor([[0.0, 0], [5, 0], [0, 5], [9, 9]])
    points = middles.repeat_interleave(30, 0) + 0.3 * torch.randn(120, 2)
    codebook, codes = kmeans(points, 4)
    assert sorted(torch.bincount(codes).tolist()) == [30] * 4
    for j in range(4):
        assert torch.allclose(codebook[j], points[codes == j].mean(0), atol=1e-5)
    assert torch.equal(codes, torch.cdist(points, codebook).argmin(1))
    assert torch.equal(kmeans(points, 4)[0], codebook)
    # As many entries as points, some of them equal, leave no error and no empty trouble.
    points = torch.tensor([[1.0], [1.0], [2.0]])
    codebook, codes = kmeans(points, 3)
    assert torch.equal(codebook[codes], points)
    with pytest.raises(ValueError, match="k must be from 1 to the 3 points: got 4"):
        kmeans(points, 4)


def test_subvectors_lie_along_the_output_channels():
    weight = torch.arange(5 * 2 * 3.0).reshape(5, 2, 3)
    rows = subvectors(weight, 4)
    assert rows.shape == (12, 4)
    assert rows[0].tolist() == [0, 6, 12, 18]
    assert rows[7].tolist() == [25, 0, 0, 0]


def test_low_rank_is_the_truncated_singular_value_decomposition():
    rows = torch.randn(50, 6)
    representations, lift = low_rank_factors(rows, 3)
    u, s, vt = np.linalg.svd(rows.numpy(), full_matrices=False)
    np.testing.assert_allclose((representations @ lift).numpy(), (u[:, :3] * s[:3]) @ vt[:3], atol=1e-5)
    representations, lift = low_rank_factors(rows, 6)
    assert torch.equal(representations, rows)
    assert torch.equal(lift, torch.eye(6))


def test_the_estimate_counts_the_axes_that_are_worth_clusters():
    axes = torch.linalg.qr(torch.randn(8, 8)).Q
    scales = torch.tensor([1.0, 0.9, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3])
    weight = ((torch.randn(500, 8) * scales) @ axes).T.reshape(8, 500)
    assert estimate_rank(weight, 8, 16) == 2
    # Formula by hand in one dimension: the variance of 16 quantized normal numbers.
    assert estimate_rank(torch.randn(8, 500), 8, 2**16) == 8


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 10, 3, stride=2, padding=1, padding_mode="reflect"),
        nn.Conv1d(4, 8, 5, groups=2, bias=False),
        nn.Linear(12, 16),
    ],
    ids=["conv2d", "conv1d", "linear"],
)
def test_a_coded_layer_computes_with_the_weight_it_stands_for(layer):
    low = LowRankLayer(layer, 4, 2)
    x = (
        torch.randn(2, 12)
        if isinstance(layer, nn.Linear)
        else torch.randn(2, 4, *(7,) * (layer.weight.ndim - 2))
    )
    wanted = torch.func.functional_call(layer, {"weight": low.weight()}, x)
    assert torch.allclose(low(x), wanted, atol=1e-6)
    low.cluster(4, softness=1e-6)
    hard = VectorQuantizedLayer(low)
    assert torch.allclose(hard(x), low(x), atol=1e-4)
    rows = low.codebook[nearest(low.vectors, low.codebook)] @ low.lift
    assert torch.allclose(subvectors(hard.weight(), 4)[: len(rows)][:, :1], rows[:, :1])
    hard(x).sum().backward()
    assert hard.codebook.grad is not None
    assert hard.lift.grad is not None


def test_full_rank_is_plain_vector_quantization_bit_for_bit():
    layer = nn.Conv2d(4, 16, 3)
    low = LowRankLayer(layer, 8, 8)
    low.cluster(8)
    hard = VectorQuantizedLayer(low)
    codebook, codes = kmeans(subvectors(layer.weight.detach(), 8), 8)
    assert torch.equal(subvectors(hard.weight(), 8), codebook[codes])
    assert hard.lift is None


def test_soft_codes_are_means_weighted_by_nearness():
    low = LowRankLayer(nn.Linear(6, 8), 4, 2)
    low.cluster(3, softness=2.0)
    apart = torch.cdist(low.vectors, low.codebook) ** 2
    rows = torch.softmax(-apart / low.temperature, 1) @ low.codebook @ low.lift
    assert torch.allclose(subvectors(low.weight(), 4), rows, atol=1e-5)
    low.weight().square().sum().backward()
    assert low.vectors.grad is not None
    assert low.codebook.grad is not None


def test_the_file_holds_the_bits_of_the_formula(tmp_path):
    low = LowRankLayer(nn.Conv2d(6, 32, 3, bias=False), 8, 4)
    low.cluster(16)
    layer = VectorQuantizedLayer(low)
    n = 32 * 6 * 9 // 8
    assert layer.stored_bits == n * 4 + 32 * (16 * 4 + 4 * 8)
    save_weights(tmp_path / "w.safetensors", layer.state_dict())
    content = (tmp_path / "w.safetensors").read_bytes()
    assert 8 * (len(content) - 8 - int.from_bytes(content[:8], "little")) == layer.stored_bits


def test_a_residual_network_goes_through_all_steps():
    model = create_model("resnet_test", num_classes=5)
    x = torch.randn(4, 3, 32, 32)
    calls = []

    def train(network):
        kinds = {type(m) for m in network.modules()}
        calls.append([LowRankLayer in kinds, VectorQuantizedLayer in kinds])
        optimizer = torch.optim.SGD(network.parameters(), 1e-3)
        network(x).square().sum().backward()
        optimizer.step()

    small, report = lr2vq(model, 8, 16, 4, train=train)
    assert calls == [[True, False], [True, False], [False, True]]
    assert report.after.bytes < report.before.bytes / 2
    assert "bits a weight" in report.notes[0]
    assert math.isfinite(float(small(x).detach().sum()))
    ranks = [m.vectors.shape[1] for m in low_rank(model)[0].modules() if isinstance(m, LowRankLayer)]
    assert all(1 <= r <= 8 for r in ranks)
    assert len(ranks) == len(report.notes)


def test_what_cannot_be():
    with pytest.raises(ValueError, match="rank must be from 1 to the subvectors' size 4: got 5"):
        LowRankLayer(nn.Linear(4, 4), 4, 5)
    with pytest.raises(ValueError, match="layers: 'a' is no convolution or linear layer"):
        low_rank(nn.Sequential(nn.Linear(2, 2)), layers=["a"])
    with pytest.raises(ValueError, match="layer must have a codebook: call its cluster first"):
        VectorQuantizedLayer(LowRankLayer(nn.Linear(4, 4), 4, 2))
