import torch
from torch import nn

from omniconv.layers.conv.depthwise import DepthwiseConv1d, DepthwiseConv2d


def test_the_layer_is_torchs_with_the_same_state():
    layer, plain = DepthwiseConv2d(6, 5, multiplier=2, padding=2), nn.Conv2d(6, 12, 5, padding=2, groups=6)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 6, 9, 7)
    assert isinstance(layer, nn.Conv2d)
    assert (layer.in_channels, layer.out_channels, layer.groups) == (6, 12, 6)
    torch.testing.assert_close(layer(x), plain(x))
    torch.testing.assert_close(layer(x[0]), plain(x[0]))
    sequence = DepthwiseConv1d(4, 3, padding="same")
    torch.testing.assert_close(sequence(torch.ones(4, 9)), sequence(torch.ones(1, 4, 9))[0])
