"""Waterlines against sums of latencies, traffic against a walk over tiles, the predictor against known coefficients."""

import numpy as np
import pytest
import torch
from torch import nn

from omniconv.design.cost import LayerCost, layer_costs
from omniconv.design.latency_model import LatencyModel, load_latency_model, save_latency_model
from omniconv.design.waterline import (
    Block,
    Kernel,
    Machine,
    Waterline,
    block_traffic,
    efficiency_gap,
    network_waterline,
    plot_roofline,
)
from omniconv.models.factory import create_model

MACHINE = Machine(4e11, 2e10)


def test_the_area_is_the_latency():
    line = network_waterline(create_model("resnet_test"), (3, 40, 48), MACHINE)
    wanted = sum(max(k.operations / 4e11, k.bytes / 2e10) for k in line.kernels)
    assert line.latency == pytest.approx(wanted, rel=1e-12)
    assert line.latency == pytest.approx(sum(map(line.seconds, line.kernels)), rel=1e-12)
    assert line.level == pytest.approx(sum(k.operations for k in line.kernels) / 4e11 / wanted)
    assert len(line.plot().axes) == 1


def test_measured_seconds_count_before_the_roofline():
    kernels = (Kernel("a", 4e9, 1e6, 0.02), Kernel("b", 4e8, 1e8))
    line = Waterline(kernels, MACHINE)
    assert line.efficiency(kernels[0]) == pytest.approx(0.5)
    assert line.efficiency(kernels[1]) == pytest.approx(4 * 2e10 / 4e11)
    assert line.latency == pytest.approx(0.02 + 0.005)
    (point,) = plot_roofline(kernels, MACHINE).axes[0].lines[1:]
    assert (point.get_xdata()[0], point.get_ydata()[0]) == (pytest.approx(4000), pytest.approx(2e11))
    assert efficiency_gap({"x": 4.0, "y": 3.0}, {"x": 2.0, "y": 1.0}) == {"x": 2.0, "y": 3.0}


@pytest.mark.parametrize("tile", [(4, 5), (7, 9), (20, 20)])
def test_traffic_of_tiles_by_marking_what_each_reads(tile):
    block, height, width = Block("mbconv", 6, 3, 5, 1), 13, 9
    loaded = 0
    for top in range(0, height, tile[0]):
        for left in range(0, width, tile[1]):
            read = np.zeros((height, width))
            read[max(0, top - 2) : top + tile[0] + 2, max(0, left - 2) : left + tile[1] + 2] = 1
            loaded += 6 * int(read.sum()) + block.weights
    assert block_traffic(block, height, width, tile=tile) == 4 * (loaded + 6 * height * width)


def test_traffic_layer_by_layer_is_that_of_the_layers():
    block, size = Block("convfirst", 16, 4, 3, 8), (12, 10)
    assert block.hidden == 64
    layers = nn.Sequential(
        nn.Conv2d(16, 16, 3, padding=1, groups=2), nn.Conv2d(16, 64, 1), nn.ReLU(), nn.Conv2d(64, 16, 1)
    )
    counted = sum(row.bytes for row in layer_costs(layers, (16, *size)))
    assert block_traffic(block, *size) == counted + 4 * 3 * 16 * 120
    assert block.weights == sum(p.numel() for p in layers.parameters())


def test_the_predictor_finds_its_coefficients_again(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    truth = {"conv": (1e-12, 3e-11, 5e-6), "norm": (0.0, 8e-11, 2e-6)}
    rows = [
        LayerCost("", kind, kind, int(m) if kind == "conv" else 0, 0, 0, 0, 0, int(b), 0)
        for kind in truth
        for m, b in rng.uniform(1e4, 1e8, (12, 2))
    ]
    times = [np.dot(truth[row.kind], (row.macs, row.bytes, 1)) for row in rows]
    model = LatencyModel.fit(rows, times, "here")
    for row, seconds in zip(rows, times, strict=True):
        assert model.seconds(row) == pytest.approx(seconds, rel=1e-4)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    parts = model.layers(net, (3, 8, 8), batch=2)
    assert set(parts) == {"0", "1"}
    assert model.predict(net, (3, 8, 8), batch=2) == pytest.approx(sum(parts.values()))

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert load_latency_model() is None
    from omniconv.design import latency_model

    here = LatencyModel(model.coefficients, latency_model._machine())
    save_latency_model(here)
    assert load_latency_model() == here
    torch.testing.assert_close(load_latency_model().seconds(rows[0]), here.seconds(rows[0]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Machine(0, 1), "peak and bandwidth must be positive: got 0 and 1"),
        (lambda: Kernel("a", 0, 1), "a: operations and bytes must be positive"),
        (lambda: Waterline((), MACHINE), "a waterline needs at least one kernel"),
        (lambda: block_traffic(Block(), 4, 4, tile=(0, 4)), "tile must be positive: got 0"),
        (lambda: LatencyModel.fit([], [], ""), "every operator needs a time: got 0 and 0"),
    ],
)
def test_messages(call, message):
    with pytest.raises(ValueError, match=message):
        call()
