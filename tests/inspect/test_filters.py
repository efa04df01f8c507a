import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from omniconv.core.errors import UsageError
from omniconv.inspect.filters import first_layer_filters
from omniconv.models.factory import create_model


def test_the_filters_are_the_first_convolutions_weights():
    model = create_model("resnet_test", num_classes=3)
    grid = first_layer_filters(model)
    weight = model.get_submodule("conv1").weight.detach().numpy()
    np.testing.assert_array_equal(grid.data["filters"], weight)
    # Colour: the tile is the weight on a scale of its own, with zero in the middle.
    tile = grid.tiles()[2]
    recovered = (2 * tile - 1).transpose(2, 0, 1) * np.abs(weight[2]).max()
    np.testing.assert_allclose(recovered, weight[2], atol=1e-6)


def test_other_channels_show_the_strongest_one():
    conv = nn.Conv2d(5, 2, 3)
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[0, 3, 1, 1] = -2.0
        conv.weight[0, 1] = 0.1
    tiles = first_layer_filters(nn.Sequential(conv)).tiles()
    assert tiles[0, 1, 1].tolist() == [0, 0, 0]
    assert (tiles[1] == 0.5).all()  # a filter of zeros is grey, without a division by zero


def test_the_picture_is_a_grid_with_transparent_gaps(tmp_path):
    grid = first_layer_filters(nn.Conv2d(3, 10, 5))
    picture = np.asarray(Image.open(io.BytesIO(grid.png())))
    assert picture.shape == (2 * 44 - 4, 8 * 44 - 4, 4)
    assert (picture[:40, :40, 3] == 255).all()
    assert (picture[40:44, :, 3] == 0).all()
    assert (picture[44:, 2 * 44 :, 3] == 0).all()  # eight in the first row, two in the second
    grid.save(tmp_path / "f.png")
    grid.save(tmp_path / "f.html")
    assert grid.plot().axes


def test_a_network_without_convolution_is_refused():
    with pytest.raises(UsageError, match="Linear has no 2-d convolution"):
        first_layer_filters(nn.Linear(2, 2))
