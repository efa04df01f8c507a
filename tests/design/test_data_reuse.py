"""Counts against closed forms and a walk through real layers, and the weighing against its ends."""

import numpy as np
import pytest
import torch
from torch import nn

from omniconv.design.cost import count_cost, layer_costs
from omniconv.design.data_reuse import Reuse, conv_reuse, data_reuse, fit_alpha, mean_reuse, total_reuse
from omniconv.models.factory import create_model


@pytest.mark.parametrize(
    ("layer", "shape", "form"),
    [
        (nn.Conv2d(6, 10, 3, padding=1), (6, 9, 7), conv_reuse(6, 10, 9, 63)),
        (nn.Conv2d(6, 8, (3, 5), 2, groups=2), (6, 9, 11), conv_reuse(6, 8, 15, 16, in_pixels=99, groups=2)),
        (nn.Conv2d(6, 6, 5, padding=2, groups=6), (6, 9, 7), conv_reuse(6, 6, 25, 63, groups=6)),
        (nn.Conv2d(6, 10, 1, bias=False), (6, 9, 7), conv_reuse(6, 10, 1, 63)),
        (nn.Linear(12, 5), (12,), conv_reuse(12, 5, 1, 1)),
    ],
)
def test_closed_forms_are_what_is_counted(layer, shape, form):
    (row,) = data_reuse(layer, shape)
    assert (row.macs, row.parameters, row.activations) == (form.macs, form.parameters, form.activations)


def test_known_values():
    assert conv_reuse(4096, 1000, 1, 1).weight_reuse == 1, "a fully connected layer uses a weight once"
    assert conv_reuse(8, 8, 9, 49, groups=8).weight_reuse == 49, "a depthwise one once for every output pixel"
    point = conv_reuse(12, 20, 1, 49)
    assert point.weight_reuse == 49
    assert point.activation_reuse == pytest.approx(12 * 20 / (12 + 20))
    assert conv_reuse(12, 12, 0, 49, kind="shuffle").weighted() == 0
    assert point.weighted(1) == point.weight_reuse
    assert point.weighted(0) == point.activation_reuse
    assert point.intensity == pytest.approx(1 / (1 / point.weight_reuse + 1 / point.activation_reuse))


def test_whole_networks():
    layers = (Reuse("a", "conv", 100, 10, 20), Reuse("b", "linear", 50, 50, 10))
    total = total_reuse(layers)
    assert (total.macs, total.parameters, total.activations) == (150, 60, 30)
    assert mean_reuse(layers, 0.5) == pytest.approx(((10 + 5) / 2 + (1 + 5) / 2) / 2)
    assert total_reuse(data_reuse(create_model("resnet50", device="meta"), (3, 224, 224))).macs == 4089184256


def test_alpha_is_found_again():
    rng = np.random.default_rng(0)
    networks = {
        str(i): Reuse("", "network", 10**6, *map(int, rng.integers(10**3, 10**4, 2))) for i in range(9)
    }
    measured = {name: 3 * reuse.weighted(0.7) + 5 for name, reuse in networks.items()}
    alpha, correlation = fit_alpha(networks, measured)
    assert alpha == pytest.approx(0.7)
    assert correlation == pytest.approx(1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: total_reuse(()), "the network has no convolution or linear layer"),
        (lambda: conv_reuse(2, 2, 1, 1).weighted(1.5), r"alpha must lie in \[0, 1\]: got 1.5"),
        (lambda: fit_alpha({}, {}), "a correlation needs at least three networks: got 0"),
    ],
)
def test_messages(call, message):
    with pytest.raises(ValueError, match=message):
        call()


class Small(nn.Module):
    """Every kind of operator once or so."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.depth = nn.Conv2d(8, 8, 3, groups=8, bias=False, dtype=torch.float32)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        y = self.depth(torch.relu(self.norm(self.conv(x))))
        z = (y + y.flip(3)).mean((2, 3))
        return self.fc(z).softmax(1)


def test_rows_hold_what_moves():
    rows = {row.name + ":" + row.kind: row for row in layer_costs(Small(), (3, 10, 9))}
    conv = rows["conv:conv"]
    assert (conv.macs, conv.parameters, conv.inputs, conv.outputs) == (27 * 8 * 56, 27 * 8 + 8, 270, 448)
    assert (conv.parameter_bytes, conv.input_bytes, conv.output_bytes) == (4 * 224, 4 * 270, 4 * 448)
    assert rows["depth:depthwise"].macs == 9 * 8 * 30
    assert rows[":softmax"].inputs == rows[":softmax"].outputs == 5
    assert rows["fc:linear"].parameters == 45
    assert rows[":pool"].outputs == 8
    cost = count_cost(Small(), (3, 10, 9))
    assert cost.activations == 448 + 240 + 5
    assert cost.bytes == sum(row.bytes for row in layer_costs(Small(), (3, 10, 9)))
