"""FInC units against corner convolutions of the quarters."""

import pytest
import torch

from omniconv.layers.conv.finc import FInCUnit
from omniconv.layers.conv.inverse import CornerConv2d


def _unit():
    torch.manual_seed(0)
    unit = FInCUnit(8, 3).double()
    for weight in unit.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return unit


def test_every_quarter_has_a_corner_of_its_own():
    unit, x = _unit(), torch.randn(2, 8, 5, 6, dtype=torch.float64)
    wanted = []
    for index, corner in enumerate(("top-left", "top-right", "bottom-left", "bottom-right")):
        layer = CornerConv2d(2, 3, corner).double()
        layer.load_state_dict(unit.corners[index].state_dict())
        wanted.append(layer(x[:, 2 * index : 2 * index + 2]))
    assert torch.equal(unit(x), torch.cat(wanted, 1))


def test_inverse_undoes_forward_and_volumes_stay():
    unit, x = _unit(), torch.randn(1, 8, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(unit.inverse(unit(x)), x)
    jacobian = torch.autograd.functional.jacobian(unit, x).reshape(96, 96)
    assert abs(torch.linalg.slogdet(jacobian)[1]) < 1e-10


def test_an_impulse_spreads_in_all_directions():
    x = torch.zeros(1, 8, 7, 7, dtype=torch.float64)
    x[:, :, 3, 3] = 1
    reached = (_unit()(x) != 0).any(1)[0]
    assert torch.equal(reached, torch.nn.functional.pad(torch.ones(5, 5), (1, 1, 1, 1)).bool())


def test_channels_must_be_divisible_by_four():
    with pytest.raises(ValueError, match="channels must be divisible by 4: got 6"):
        FInCUnit(6)
