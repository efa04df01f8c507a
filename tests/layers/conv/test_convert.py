"""Shapes that layers see."""

import torch
from torch import nn

from omniconv.layers.conv.convert import input_shapes


def test_shapes_are_those_of_the_inputs_and_the_network_stays_as_it_is():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1), nn.Sequential(nn.BatchNorm2d(4), nn.MaxPool2d(2)), nn.Conv2d(4, 5, 1)
    )
    model[1].eval()
    shapes = input_shapes(model, torch.zeros(2, 3, 8, 12), (nn.Conv2d, nn.MaxPool2d))
    assert shapes == {"0": (2, 3, 8, 12), "1.1": (2, 4, 4, 6), "2": (2, 4, 2, 3)}
    assert [m.training for m in model] == [True, False, True]
    assert not model[0]._forward_pre_hooks
    assert torch.equal(model.state_dict()["1.0.running_mean"], torch.zeros(4))
