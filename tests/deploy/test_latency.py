import numpy as np
import pytest
import torch
from torch import nn

from omniconv.core.errors import UsageError
from omniconv.deploy.export import Deployable, export_model
from omniconv.deploy.latency import eager_candidate, exported_candidate, measure


def test_candidates_take_turns_after_a_warm_up():
    calls = []
    result = measure({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=4, warmup=2)
    assert calls == ["a", "b"] * 6
    for latency in result.values():
        assert (latency.rounds, latency.threads) == (4, torch.get_num_threads())
        assert 0 <= latency.best <= latency.median <= latency.p90


def test_statistics_are_those_of_the_calls(monkeypatch):
    # Calls that take 1, 2, ... 10 ms by this clock.
    ticks = iter([t for ms in range(1, 11) for t in (0.0, ms / 1e3)])
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    found = measure({"a": lambda: None}, rounds=10, warmup=0)["a"]
    assert (found.median, found.p90, found.best) == pytest.approx((5.5, 9.1, 1.0))


def test_nothing_to_measure():
    with pytest.raises(UsageError, match="nothing to measure: got 0 candidates and 5 rounds"):
        measure({}, rounds=5)


def test_every_way_computes_the_same(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    images = torch.rand(2, 3, 9, 11)
    export_model(model, nn.Identity(), list(images), tmp_path, formats=("torch", "onnx", "openvino"))
    eager = eager_candidate(Deployable(nn.Identity(), model, "probabilities"), images, rounds=1)()
    for name in ("model.pt2", "model.onnx", "model.xml"):
        np.testing.assert_allclose(exported_candidate(tmp_path / name, images.numpy())(), eager, atol=1e-5)
