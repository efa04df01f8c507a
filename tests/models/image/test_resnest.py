"""ResNeSt: what its block becomes with a single split."""

import torch
from torch import nn

from omniconv.models.image.resnest import ResNeStConfig, SplitAttentionBlock
from omniconv.models.image.resnet import Bottleneck, ResNetConfig


def test_a_single_split_with_open_gates_is_resnext():
    torch.manual_seed(0)
    options = {"shortcut": "pool", "cardinality": 4, "base_width": 16}
    block = SplitAttentionBlock(ResNeStConfig(radix=1, **options), 32, 16, 1, 0, 0.0)
    nn.init.zeros_(block.conv2.fc2.weight)
    nn.init.constant_(block.conv2.fc2.bias, 100.0)
    plain = Bottleneck(ResNetConfig(**options), 32, 16, 1, 0, 0.0)
    state = {
        name.replace("conv2.conv.", "conv2.").replace("conv2.bn0.", "bn2."): value
        for name, value in block.state_dict().items()
        if not name.startswith(("conv2.fc", "conv2.bn1"))
    }
    plain.load_state_dict(state)
    x = torch.randn(2, 32, 7, 5)
    torch.testing.assert_close(block(x), plain(x))
