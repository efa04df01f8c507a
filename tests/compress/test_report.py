import json

import pytest
import torch
from torch import nn

from omniconv.compress.prune.global_magnitude import global_magnitude
from omniconv.compress.report import CompressionReport, ModelSize, compare
from omniconv.compress.sparse_file import save_sparse
from omniconv.models.factory import create_model


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, groups=4),
        nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    )


def test_figures_equal_those_counted_by_hand():
    model = small()
    with torch.no_grad():
        model[0].weight[:6] = 0
        model[6].weight[0] = 0
    report = compare("by hand", small(), model, input_shape=(3, 9, 7))
    weights = [8 * 3 * 9, 8 * 2 * 9, 8 * 3 * 9, 30]
    zeros = [6 * 3 * 9, 0, 0, 6]
    # 9x7 -> 5x4 -> 3x2, transposed from 3x2, one row.
    positions = [20, 6, 6, 1]
    assert [layer.name for layer in report.layers] == ["0", "2", "3", "6"]
    assert [layer.weights for layer in report.layers] == weights
    assert [layer.weights - layer.nonzero for layer in report.layers] == zeros
    macs = [w * p for w, p in zip(weights, positions, strict=True)]
    assert [layer.macs for layer in report.layers] == macs
    assert report.before.macs == report.after.macs == sum(macs)
    assert report.before.sparse_macs == sum(macs)
    assert report.after.sparse_macs == sum(macs) - sum(z * p for z, p in zip(zeros, positions, strict=True))
    assert report.before.parameters == sum(weights) + 8 + 8 + 8 + 8 + 5
    # A fresh batch norm's biases are zero too.
    assert report.before.nonzero == report.before.parameters - 8
    assert report.after.nonzero == report.before.nonzero - sum(zeros)


def test_bytes_are_those_of_the_file(tmp_path):
    model = create_model("resnet_test", num_classes=10)
    pruned, report = global_magnitude(model, 0.9)
    save_sparse(tmp_path / "before.safetensors", model.state_dict())
    save_sparse(tmp_path / "after.safetensors", pruned.state_dict())
    for name, size in (("before", report.before), ("after", report.after)):
        file = (tmp_path / f"{name}.safetensors").stat().st_size
        header = 8 + int.from_bytes((tmp_path / f"{name}.safetensors").read_bytes()[:8], "little")
        assert file - header <= size.bytes <= file


def test_a_layer_called_twice_counts_twice():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4, bias=False)

        def forward(self, x):
            return self.fc(self.fc(x))

    model = Twice()
    _, report = global_magnitude(model, 0.25, input_shape=(4,))
    assert report.after.macs == 32
    assert report.after.sparse_macs == 24


def test_unknown_multiply_adds_stay_unknown():
    report = compare("same", small(), small())
    assert report.before.macs is None
    assert report.after.sparse_macs is None
    assert "multiply-adds" not in report.table()


def test_it_is_json_and_a_table():
    _, report = global_magnitude(small(), 0.5, input_shape=(3, 9, 7))
    values = json.loads(json.dumps(report.to_dict()))
    assert values["method"] == "global magnitude pruning"
    assert values["after"]["sparse_macs"] == report.after.sparse_macs
    assert [layer["name"] for layer in values["layers"]] == ["0", "2", "3", "6"]
    table = report.table()
    assert str(report) == table
    assert f"{report.before.nonzero:,}" in table
    assert f"{report.layers[0].density:.2%}" in table
    assert report.notes[0] in table


@pytest.mark.parametrize("after", [ModelSize(50, 0), ModelSize(0, 0, 0, 0, 0)])
def test_a_table_of_nothing_left(after):
    assert "50" in CompressionReport("all gone", ModelSize(50, 50, 50, 50, 200), after).table()
