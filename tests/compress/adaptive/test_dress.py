import pytest
import torch
from torch import nn
from torch.nn import functional as F

from omniconv.compress.adaptive.dress import SparseSubnets, pack_rows, row_levels
from omniconv.compress.prune.masks import prunable_weights
from omniconv.models.factory import create_model

SPARSITIES = (0.5, 0.8, 0.9)
X = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def made() -> SparseSubnets:
    torch.manual_seed(0)
    return SparseSubnets(create_model("resnet_test", num_classes=10), SPARSITIES)


def test_masks_are_nested_and_rows_equally_full():
    subnets = made()
    for name, weight in prunable_weights(subnets.model).items():
        columns = weight[0].numel()
        for sparsity, masks in zip(SPARSITIES, map(subnets.masks, range(3)), strict=True):
            rows = masks[name].flatten(1)
            assert rows.sum(1).tolist() == [max(1, round((1 - sparsity) * columns))] * len(weight)
            kept, gone = (
                weight.detach().flatten(1).abs().where(m, other) for m, other in ((rows, 9.0), (~rows, 0))
            )
            assert (kept.min(1).values >= gone.max(1).values).all()
        for k in (1, 2):
            assert not (subnets.masks(k)[name] & ~subnets.masks(k - 1)[name]).any()


@pytest.mark.parametrize(("shape", "index"), [((7, 30), torch.uint8), ((5, 13, 5, 5), torch.int16)])
def test_a_prefix_of_the_rows_is_the_subnet(shape, index):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    packed = pack_rows(weight, row_levels(weight, SPARSITIES))
    rows = weight.flatten(1)
    assert packed.columns.dtype == index
    assert packed.nbytes == packed.counts[0] * shape[0] * (4 + index.itemsize)
    x = torch.randn(3, 2, rows.shape[1])
    for k, count in enumerate(packed.counts):
        threshold = rows.abs().sort(1, descending=True).values[:, count - 1 : count]
        dense = rows * (rows.abs() >= threshold)
        assert torch.equal(packed.dense(k), dense.reshape(shape))
        torch.testing.assert_close(packed.matmul(x, k), x @ dense.T)
        values, columns = packed.prefix(k)
        assert values.data_ptr() == packed.values.data_ptr()
        assert columns.data_ptr() == packed.columns.data_ptr()
        assert values.is_contiguous()


def test_outputs_are_those_of_plain_masked_copies():
    subnets = made()
    subnets.recalibrate([X[:4], X[4:]])
    subnets.eval()
    for k, output in enumerate(subnets(X)):
        plain = subnets.extract(k).eval()
        torch.testing.assert_close(plain(X), output)
        torch.testing.assert_close(subnets(X, k), output)
        for name, weight in prunable_weights(plain).items():
            assert torch.equal(weight != 0, subnets.masks(k)[name])
            assert torch.equal(subnets.packed_rows()[name].dense(k), weight)


def test_recalibration_gives_each_subnet_the_plain_mean_of_its_batches():
    subnets = made()
    subnets(X)
    subnets.recalibrate([X[:4], X[4:]])
    for k in range(3):
        plain = subnets.extract(k)
        inputs = [nn.Sequential(plain.conv1)(part) for part in (X[:4], X[4:])]
        norm = plain.bn1
        torch.testing.assert_close(
            norm.running_mean, torch.stack([i.mean((0, 2, 3)) for i in inputs]).mean(0)
        )
    assert all(m.momentum == 0.1 for m in subnets.modules() if isinstance(m, nn.BatchNorm2d))
    means = [subnets.extract(k).layer1[0].bn1.running_mean for k in range(3)]
    assert not torch.equal(means[0], means[2])


def loss(subnets: SparseSubnets) -> torch.Tensor:
    return sum(F.cross_entropy(output, torch.arange(8)) for output in subnets(X)) / 3


def test_gradients_pass_straight_through_until_the_masks_are_fixed():
    subnets = made()
    weight = subnets.model.conv1.weight
    outside = ~subnets.masks(0)["conv1"]
    loss(subnets).backward()
    assert weight.grad[outside].abs().min() > 0
    subnets.fix()
    subnets.zero_grad()
    loss(subnets).backward()
    assert (weight.grad[outside] == 0).all()
    # The gradient is the mean of those of the subnets alone.
    expected = torch.zeros_like(weight)
    for k in range(3):
        plain = subnets.extract(k).train()
        F.cross_entropy(plain(X), torch.arange(8)).backward()
        expected += plain.conv1.weight.grad * subnets.masks(k)["conv1"] / 3
    torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-6)


def test_masks_follow_the_magnitudes_until_they_are_fixed():
    subnets = made()
    weight = subnets.model.conv1.weight
    before = subnets.masks(2)["conv1"]
    with torch.no_grad():
        weight.copy_(1 / weight)
    subnets.resample()
    fixed = subnets.masks(2)["conv1"]
    assert not torch.equal(fixed, before)
    subnets.fix()
    with torch.no_grad():
        weight.copy_(1 / weight)
    subnets.resample()
    assert torch.equal(subnets.masks(2)["conv1"], fixed)
    # What is stored follows the masks, not the magnitudes of now, and so does a saved state.
    assert torch.equal(subnets.packed_rows()["conv1"].dense(2), weight * fixed)
    other = made()
    other.load_state_dict(subnets.state_dict())
    assert torch.equal(other.masks(2)["conv1"], fixed)


@pytest.mark.parametrize("sparsities", [(), (0.9, 0.8), (0.5, 0.5), (0.5, 1.0)])
def test_sparsities_must_rise(sparsities):
    with pytest.raises(ValueError, match=r"sparsities must rise within \[0, 1\)"):
        SparseSubnets(nn.Linear(3, 3), sparsities)
