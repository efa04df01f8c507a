"""Shape bias on decisions that are known."""

import math

import pytest
import torch
from torch import nn

from omniconv.inspect.shape_bias import shape_bias


def test_it_is_the_share_of_shape_among_decisions_for_either_cue():
    decisions = torch.tensor([0, 1, 2, 0, 1])
    images = nn.functional.one_hot(decisions, 4).float()[:, :, None, None]
    shapes, textures = torch.tensor([0, 1, 2, 1, 3]), torch.tensor([1, 2, 3, 0, 2])
    # Three for the shape, one for the texture, one for neither.
    assert shape_bias(nn.Flatten(), images, shapes, textures) == 0.75
    assert math.isnan(shape_bias(nn.Flatten(), images[4:], shapes[4:], textures[4:]))
    with pytest.raises(ValueError, match="must differ in every picture"):
        shape_bias(nn.Flatten(), images, shapes, shapes)
