"""QLNet: the symmetry of its stream, where it ends, and the names and counts of the official code."""

import pytest
import torch
from torch import nn

from omniconv.models.factory import create_model
from omniconv.models.image.qlnet import BallProjection, QLNet, QLNetConfig, change_basis

CONFIG = QLNetConfig((2, 3), (6, 8), wide_until=6, stem="3x3")


def network(config=CONFIG):
    torch.manual_seed(0)
    model = QLNet(config, 4).double()
    for name, value in model.state_dict().items():
        if "running_var" in name:
            nn.init.uniform_(value, 0.5, 2)
        elif value.is_floating_point() and value.ndim == 1:
            nn.init.normal_(value, 0.3, 0.5)
    return model.eval()


def rotation(channels):
    return torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))[0]


@pytest.mark.parametrize(
    ("first", "last", "channels"), [(0, 1, 6), (0, 2, 6), (3, 4, 8), (2, 4, 8), (1, 2, 6)]
)
def test_outputs_do_not_depend_on_the_basis_of_the_stream(first, last, channels):
    model = network()
    x = torch.randn(2, 3, 16, 12, dtype=torch.float64)
    matrix = rotation(channels)
    if first != 2:  # no ball at the end of this block: any invertible matrix will do
        matrix = matrix @ torch.diag(torch.linspace(0.5, 2, channels, dtype=torch.float64))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    other = change_basis(model, first, last, matrix)
    torch.testing.assert_close(other(x), model(x), rtol=1e-10, atol=1e-10)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for index, (ours, plain) in enumerate(zip(other.blocks(), model.deploy().blocks(), strict=True)):
        changed = not torch.equal(ours.conv3.weight, plain.conv3.weight)
        assert changed == (first <= index < last)
        assert isinstance(ours.skip, nn.Identity) == (
            isinstance(plain.skip, nn.Identity) and index not in (first, last)
        )


def test_what_breaks_the_symmetry_is_refused():
    matrix = 2 * torch.eye(8, dtype=torch.float64)
    with pytest.raises(ValueError, match="must be orthogonal behind the BallProjection of block 2"):
        change_basis(network(), 2, 3, matrix)
    with pytest.raises(ValueError, match="must be the identity behind the ReLU of block 2"):
        change_basis(network(QLNetConfig((2, 3), (6, 8), 6, act="relu", stem="3x3")), 2, 3, rotation(8))
    with pytest.raises(ValueError, match="must share one stream"):
        change_basis(network(), 1, 3, rotation(6))
    with pytest.raises(ValueError, match="matrix must be 6 x 6"):
        change_basis(network(), 0, 1, rotation(8))
    with pytest.raises(ValueError, match="0 <= first < last < 5"):
        change_basis(network(), 4, 5, rotation(8))


def test_the_projection_shortens_what_lies_outside_the_ball():
    x = torch.randn(2, 5, 4, 3, dtype=torch.float64) * torch.tensor([0.3, 3.0]).view(2, 1, 1, 1)
    y = BallProjection()(x)
    for n in range(2):
        for i in range(4):
            for j in range(3):
                length = float(x[n, :, i, j].norm())
                torch.testing.assert_close(y[n, :, i, j], x[n, :, i, j] * min(1, 5**0.5 / length))
    assert BallProjection()(torch.zeros(1, 5, 1, 1)).abs().sum() == 0


def test_names_and_shapes_are_those_of_the_official_code():
    """Typed from PDEBlock of liuyao12/ConvNets-PDE-perspective, resnet.py."""
    state = create_model("qlnet50", device="meta").state_dict()
    block = {
        name[len("layer3.0.") :] for name in state if name.startswith("layer3.0.") and name.endswith("weight")
    }
    assert block == {
        "conv1.conv.weight", "conv1.bn.weight", "conv2.weight", "bn2.weight", "conv3.conv.weight", "conv3.bn.weight",
        "skip.conv.weight", "skip.bn.weight",
    }  # fmt: skip
    assert state["layer3.0.conv1.conv.weight"].shape == (1024, 128, 1, 1)
    assert state["layer3.0.conv2.weight"].shape == (1024, 1, 3, 3)
    assert state["layer3.0.conv3.conv.weight"].shape == (256, 1024, 1, 1)
    assert state["layer3.1.conv1.conv.weight"].shape == (1024, 256, 1, 1)
    assert state["fc.weight"].shape == (1000, 512)


def test_depths_and_widths_must_agree():
    with pytest.raises(ValueError, match="depths and widths must be equally long"):
        QLNetConfig((1, 2), (8,))
