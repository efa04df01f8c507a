"""SparseNet: links as in the paper, blocks against their sums written out, names of the official code."""

import pytest
import torch
from torch import nn

from omniconv.models.factory import create_model
from omniconv.models.image.densenet import DenseBlock, DenseNetConfig, inputs_of
from omniconv.models.image.sparsenet import OFFICIAL_NAMES
from omniconv.models.weights import rename


def test_a_sparse_layer_reads_what_lies_one_two_four_and_more_layers_back():
    assert [inputs_of(layer, "sparse") for layer in (1, 2, 3, 4, 9)] == [
        [0], [1, 0], [2, 1], [3, 2, 0], [8, 7, 5, 1],
    ]  # fmt: skip
    for layer in range(1, 300):
        powers = [layer - distance for distance in (1, 2, 4, 8, 16, 32, 64, 128, 256) if distance <= layer]
        assert inputs_of(layer, "sparse") == powers
        assert inputs_of(layer, "dense") == list(range(layer))


@pytest.mark.parametrize("merge", ["concat", "sum"])
def test_a_sparse_block_is_its_sums_written_out(merge):
    torch.manual_seed(0)
    config = DenseNetConfig((4,), (5,), aggregation="sparse", merge=merge, bottleneck=False, stem="3x3")
    block = DenseBlock(config, 0, config.first_channels()).double()
    for name, value in block.state_dict().items():
        if "running_var" not in name and value.is_floating_point():
            nn.init.normal_(value)
    block.eval()

    def join(*parts):
        return torch.cat(parts, 1) if merge == "concat" else sum(parts)

    f = list(block.values())
    y0 = torch.randn(2, config.first_channels(), 7, 6, dtype=torch.float64)
    y1 = f[0](y0)
    y2 = f[1](join(y1, y0))
    y3 = f[2](join(y2, y1))
    y4 = f[3](join(y3, y2, y0))
    torch.testing.assert_close(block(y0), join(y4, y3, y1))
    assert block.out_channels == (15 if merge == "concat" else 5)


def test_the_network_that_adds_trains_at_any_depth():
    model = create_model(
        "sparsenet_test", num_classes=3, depths=(6, 5), merge="sum", bottleneck=True, layer_drop_rate=0.1
    )
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.feature_info.channels() == [8, 12]


def test_official_names_of_sparsenet_become_ours():
    """Names typed from Lyken17/SparseNet, src/pytorch/denselink.py."""
    model = create_model("sparsenet_bc_100_24_cifar", device="meta")
    official = ["features.conv0.weight", "classifier.linear.weight", "classifier.linear.bias"]
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    official += [f"features.norm_last.{key}" for key in norm]
    for stage in range(3):
        for block in range(1, 17):
            prefix = f"features.dense-stage-{stage}.block-{block}."
            official += [f"{prefix}bn{i}.{key}" for i in (1, 2) for key in norm]
            official += [f"{prefix}conv{i}.weight" for i in (1, 2)]
        if stage < 2:
            official += [f"features.transition-{stage}.bn1.{key}" for key in norm]
            official += [f"features.transition-{stage}.conv1.weight"]
    empty = torch.empty(0)
    assert set(rename(dict.fromkeys(official, empty), OFFICIAL_NAMES)) == set(model.state_dict())
