"""DenseNet beside timm's (see test_timm_parity): dense links, and configurations that cannot be."""

import pytest
import torch
from torch import nn

from omniconv.models.factory import create_model
from omniconv.models.image.densenet import DenseBlock, DenseNetConfig


def test_a_dense_block_keeps_all_that_it_has_read():
    torch.manual_seed(0)
    block = DenseBlock(DenseNetConfig((3,), (4,)), 0, 8).double().eval()
    nn.init.normal_(block["denselayer3"].get_parameter("norm1.bias"))
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    seen = x
    for layer in block.values():
        seen = torch.cat([seen, layer(seen)], 1)
    torch.testing.assert_close(block(x), seen)
    assert block.out_channels == 20


def test_wrong_configurations_are_explained():
    with pytest.raises(ValueError, match="depths and growth_rates must be equally long"):
        create_model("densenet_test", depths=(1,))
    with pytest.raises(ValueError, match="stem_width must be None or the first growth rate"):
        create_model("densenet_test", merge="sum", stem_width=16)
    assert DenseNetConfig().first_channels() == 64
