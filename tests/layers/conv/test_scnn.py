"""Spatial CNN against loops over single pixels, and how far it carries."""

import pytest
import torch

from omniconv.design.cost import count_cost
from omniconv.layers.conv.scnn import SpatialCNN, pass_messages


def by_pixels(x, weight):
    """Messages down, one pixel at a time."""
    y = x.clone()
    _, _, height, width = x.shape
    reach = weight.shape[2] // 2
    for i in range(1, height):
        for j in range(width):
            message = torch.zeros_like(y[:, :, i, j])
            for tap in range(weight.shape[2]):
                column = j + tap - reach
                if 0 <= column < width:
                    message = message + y[:, :, i - 1, column] @ weight[:, :, tap].T
            y[:, :, i, j] = y[:, :, i, j] + message.clamp(min=0)
    return y


@pytest.mark.parametrize(
    ("direction", "turn"),
    [
        ("down", lambda x: x),
        ("up", lambda x: x.flip(2)),
        ("right", lambda x: x.transpose(2, 3)),
        ("left", lambda x: x.flip(3).transpose(2, 3)),
    ],
)
def test_a_pass_is_the_loop(direction, turn):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    weight = torch.randn(3, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(turn(pass_messages(x, weight, direction)), by_pixels(turn(x), weight))


def test_passes_follow_one_another_down_up_right_left():
    torch.manual_seed(0)
    layer = SpatialCNN(3, 5).double()
    x = torch.randn(1, 3, 4, 6, dtype=torch.float64)
    y = by_pixels(x, layer.weight["down"])
    y = by_pixels(y.flip(2), layer.weight["up"]).flip(2)
    y = by_pixels(y.transpose(2, 3), layer.weight["right"]).transpose(2, 3)
    y = by_pixels(y.flip(3).transpose(2, 3), layer.weight["left"]).transpose(2, 3).flip(3)
    torch.testing.assert_close(layer(x), y)


def test_weights_and_multiply_adds_are_the_formulas():
    cost = count_cost(SpatialCNN(16, 9), (16, 12, 20))
    assert cost.parameters == 4 * 16 * 16 * 9
    assert cost.macs == 2 * (11 * 20 + 19 * 12) * 16 * 16 * 9
