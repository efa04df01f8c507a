import pytest
import torch

from omniconv.layers.norm.layer_norm2d import LayerNorm2d


def test_equation_pixel_by_pixel():
    layer = LayerNorm2d(6, eps=1e-3).double()
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    y = layer(x)
    for n in range(2):
        for i in range(4):
            for j in range(5):
                pixel = x[n, :, i, j]
                normed = (pixel - pixel.mean()) / (pixel.var(unbiased=False) + 1e-3).sqrt()
                torch.testing.assert_close(y[n, :, i, j], layer.weight * normed + layer.bias)


def test_neither_the_layout_nor_the_batch_matters():
    layer = LayerNorm2d(8)
    x = torch.randn(3, 8, 5, 7)
    last = layer(x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, layer(x))
    torch.testing.assert_close(layer(x[1:2]), layer(x)[1:2])


def test_names_are_those_of_the_public_weights():
    assert list(LayerNorm2d(4).state_dict()) == ["weight", "bias"]
    assert not LayerNorm2d(4, affine=False).state_dict()
    assert LayerNorm2d(4).eps == 1e-6
    with pytest.raises(ValueError, match="num_channels must be positive: got 0"):
        LayerNorm2d(0)
