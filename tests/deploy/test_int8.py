"""Static int8 on a network trained on scikit-learn's digits; ranges against brute force."""

import itertools

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from omniconv.core.errors import RefusedError, UsageError
from omniconv.data.preprocess import Preprocess
from omniconv.deploy.export import export_model
from omniconv.deploy.int8 import _least_error_range, _percentile_range, quantize_int8
from omniconv.deploy.runtimes import open_exported


@pytest.fixture(scope="module")
def digits():
    found = load_digits()
    images = (found.images[:, None] * (255 / 16)).astype(np.uint8)
    return images, found.target


@pytest.fixture(scope="module")
def source(digits, tmp_path_factory):
    """A float ONNX file of a small network with batch norm and a residual, trained on the first 1,200 digits."""
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.act = (
                nn.Conv2d(16, 16, 3, padding=1, bias=False),
                nn.BatchNorm2d(16),
                nn.ReLU(),
            )

        def forward(self, x):
            return self.act(x + self.bn(self.conv(x)))

    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), Block(), nn.MaxPool2d(2), Block(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip
    images, labels = torch.from_numpy(digits[0]), torch.from_numpy(digits[1])
    preprocess = Preprocess(8, [0.3], [0.37])
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _epoch, indices in itertools.product(range(8), torch.arange(1200).split(100)):
        optimizer.zero_grad()
        F.cross_entropy(model(preprocess(images[indices])), labels[indices]).backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("int8")
    export_model(model, preprocess, list(images[:3]), folder, formats=("onnx",))
    return folder / "model.onnx"


def accuracy(digits):
    return lambda predict: float((predict(digits[0][1200:]).argmax(1) == digits[1][1200:]).mean())


def test_keeps_the_accuracy_of_the_float_file(source, digits, tmp_path):
    score = accuracy(digits)
    report = quantize_int8(
        source, digits[0][:200], tmp_path / "int8.onnx", evaluate=score, max_drop=0.01, min_speedup=0
    )
    assert report.score_before == score(open_exported(source)) > 0.93
    assert report.score_after == score(open_exported(tmp_path / "int8.onnx"))
    assert report.drop == report.score_before - report.score_after <= 0.01
    assert report.score_after == max(trial.score for trial in report.tried)
    assert {trial.method for trial in report.tried} == {"minmax", "percentile", "error"}
    assert report.bytes_after == (tmp_path / "int8.onnx").stat().st_size
    assert report.speedup == report.latency_before / report.latency_after


def test_weights_have_a_scale_a_channel_and_preprocessing_stays_float(source, digits, tmp_path):
    quantize_int8(source, digits[0][:50], tmp_path / "int8.onnx", min_speedup=0, max_drop=1)
    model = onnx.load(tmp_path / "int8.onnx")
    onnx.checker.check_model(model)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    made_by = {name: node for node in model.graph.node for name in node.output}
    convs = [node for node in model.graph.node if node.op_type == "Conv"]
    assert len(convs) == 3
    for conv in convs:
        weight = made_by[conv.input[1]]
        assert weight.op_type == "DequantizeLinear"
        assert constants[weight.input[0]].dtype == np.int8
        assert constants[weight.input[1]].shape == (16,)
        assert made_by[conv.input[0]].op_type == "DequantizeLinear"
    first = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
    before = model.graph.node[: list(model.graph.node).index(first)]
    assert {"Cast", "Resize", "Sub", "Div"} <= {node.op_type for node in before}
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}


def test_first_and_last_layer_stay_float_when_the_score_asks_for_it(source, digits, tmp_path):
    scores = iter(
        [1.0, 0.5, 0.4, 0.6, 0.9, 0.995, 0.98]
    )  # float; three ways; three ways with both ends in float
    report = quantize_int8(
        source, digits[0][:20], tmp_path / "int8.onnx", evaluate=lambda _: next(scores), min_speedup=0
    )
    assert (report.method, report.score_after, len(report.tried)) == ("percentile", 0.995, 6)
    graph = onnx.load(tmp_path / "int8.onnx").graph
    made_by = {name: node for node in graph.node for name in node.output}
    heavy = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
    assert [node.name for node in (heavy[0], heavy[-1])] == report.float_nodes
    stays = [node.input[1] not in made_by for node in heavy]
    assert stays == [True, False, False, True]


def test_refuses_what_loses_too_much_and_what_is_too_slow(source, digits, tmp_path):
    float_outputs = open_exported(source)(digits[0][:20])
    exact = lambda predict: float(np.array_equal(predict(digits[0][:20]), float_outputs))  # noqa: E731
    message = (
        r"^int8 lowers the score of model\.onnx by 1\.0000 \(1\.0000 to 0\.0000; 0\.5000 allowed\); nothing"
    )
    with pytest.raises(RefusedError, match=message):
        quantize_int8(source, digits[0][:20], tmp_path / "int8.onnx", evaluate=exact, max_drop=0.5)
    message = r"^int8 runs model\.onnx \S+ times as fast as float here \(\S+ ms, float \S+ ms, batch 2, \d+ threads; 1e"
    with pytest.raises(RefusedError, match=message):
        quantize_int8(
            source, digits[0][:20], tmp_path / "int8.onnx", min_speedup=1e6, batch=2, rounds=2, max_drop=1
        )
    assert list(tmp_path.iterdir()) == []


def test_needs_images(source, tmp_path):
    with pytest.raises(UsageError, match="got none"):
        quantize_int8(source, [], tmp_path / "int8.onnx")


def squared_error(values, low, high):
    step = (high - low) / 255
    rounded = np.round((np.clip(values, low, high) - low) / step) * step + low
    return ((values - rounded) ** 2).mean()


@pytest.mark.parametrize("relu", [False, True])
def test_least_error_range_is_nearly_the_best_by_brute_force(relu):
    values = np.random.default_rng(0).standard_t(3, 200_000)
    values = np.maximum(values, 0) if relu else values
    limits = min(0.0, values.min()), values.max()
    counts = np.histogram(values[values != 0], 2048, limits)[0]
    low, high = _least_error_range(counts, *limits)
    shares = np.linspace(0.3, 1, 71)
    best = min(squared_error(values, limits[0] * share, limits[1] * share) for share in shares)
    assert squared_error(values, low, high) <= 1.05 * best < squared_error(values, *limits)


def test_percentile_range_leaves_out_the_tails():
    values = np.random.default_rng(0).standard_normal(1_000_000)
    values[:20] = 50
    limits = values.min(), values.max()
    low, high = _percentile_range(np.histogram(values, 2048, limits)[0], *limits)
    width = (limits[1] - limits[0]) / 2048
    assert low == pytest.approx(np.percentile(values, 0.01), abs=width)
    assert high == pytest.approx(np.percentile(values, 99.99), abs=width)


def test_a_constant_tensor_keeps_its_range():
    nothing = np.zeros(2048, np.int64)
    assert _percentile_range(nothing, 0.0, 0.0) == _least_error_range(nothing, 0.0, 0.0) == (0.0, 0.0)
