"""OSNet: scales of its streams, one shared gate, instance norms in their places, names of torchreid."""

import pytest
import torch
from torch import nn

from omniconv.design.cost import count_cost
from omniconv.models.factory import create_model
from omniconv.models.image.osnet import OFFICIAL_NAMES, OSBlock
from omniconv.models.weights import rename

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@pytest.mark.parametrize(("name", "macs"), [("osnet_x1_0", 978.9e6), ("osnet_ain_x0_25", 82.3e6)])
def test_published_multiply_adds_of_a_person(name, macs):
    model = create_model(name, num_classes=0, device="meta")
    assert count_cost(model, (3, 256, 128)).macs == pytest.approx(macs, rel=1e-3)


def test_stream_t_sees_a_window_of_2t_plus_1_pixels():
    block = OSBlock(16, 16).eval()
    for t, stream in enumerate(block.conv2, 1):
        x = torch.randn(1, 4, 15, 15, requires_grad=True)
        for module in stream.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.uniform_(module.weight, 0.1, 1)
        # Positive values and weights: no ReLU hides a path.
        (gradient,) = torch.autograd.grad(stream(x.abs())[0, :, 7, 7].sum(), x)
        rows, columns = (gradient[0].abs().sum(0) > 0).nonzero(as_tuple=True)
        assert (rows.min(), rows.max(), columns.min(), columns.max()) == (7 - t, 7 + t, 7 - t, 7 + t)


@pytest.mark.parametrize("place", ["none", "inside", "outside", "both"])
def test_a_block_is_its_equation_written_out(place):
    torch.manual_seed(0)
    block = OSBlock(8, 16, 3, place).double().eval()
    x = torch.randn(2, 8, 6, 5, dtype=torch.float64)

    def normed(y):
        return (y - y.mean((2, 3), keepdim=True)) / (y.var((2, 3), keepdim=True, correction=0) + 1e-5).sqrt()

    reduced = block.conv1(x)
    total = 0
    for stream in block.conv2:
        y = stream(reduced)
        hidden = (y.mean((2, 3)) @ block.gate.fc1.weight[:, :, 0, 0].T + block.gate.fc1.bias).relu()
        gate = torch.sigmoid(hidden @ block.gate.fc2.weight[:, :, 0, 0].T + block.gate.fc2.bias)
        total = total + gate[:, :, None, None] * y
    y = block.conv3(total)
    y = normed(y) if place in ("inside", "both") else y
    y = y + block.downsample(x)
    y = normed(y) if place in ("outside", "both") else y
    torch.testing.assert_close(block(x), y.relu())


def test_official_names_of_both_kinds_become_ours():
    """Names typed from torchreid/models/osnet.py and osnet_ain.py."""

    def light(prefix):
        return [f"{prefix}.{part}" for part in ("conv1.weight", "conv2.weight", *(f"bn.{k}" for k in NORM))]

    def conv(prefix):
        return [f"{prefix}.conv.weight", *(f"{prefix}.bn.{key}" for key in NORM)]

    head = [f"fc.1.{key}" for key in NORM]
    head += [f"{name}.{key}" for name in ("fc.0", "classifier") for key in ("weight", "bias")]
    old = conv("conv1") + conv("conv5") + head
    for stage in (2, 3, 4):
        for index in (0, 1):
            block = f"conv{stage}.{index}"
            old += conv(f"{block}.conv1") + conv(f"{block}.conv3")
            old += conv(f"{block}.downsample") if index == 0 else []
            old += [f"{block}.gate.fc{i}.{key}" for i in (1, 2) for key in ("weight", "bias")]
            old += light(f"{block}.conv2a")
            for letter, depth in (("b", 2), ("c", 3), ("d", 4)):
                old += [name for i in range(depth) for name in light(f"{block}.conv2{letter}.{i}")]
        old += conv(f"conv{stage}.2.0") if stage < 4 else []
    state = create_model("osnet_x0_25", device="meta").state_dict()
    assert set(rename(dict.fromkeys(old, torch.empty(0)), OFFICIAL_NAMES)) == set(state)

    state = set(create_model("osnet_ain_x0_25", device="meta").state_dict())
    assert rename(dict.fromkeys(state, torch.empty(0)), OFFICIAL_NAMES).keys() == state
    assert {
        "conv1.bn.weight",
        "conv2.0.IN.weight",
        "conv2.1.conv2.3.layers.3.bn.bias",
        "pool2.0.bn.weight",
    } <= state
    assert not {"conv2.0.conv3.bn.weight", "conv3.0.IN.weight", "conv4.1.IN.weight"} & state


def test_widths_and_places_must_agree():
    with pytest.raises(ValueError, match="widths must be one longer than places"):
        create_model("osnet_test", widths=(8, 16))
