"""Xception against figure 5 of its paper."""

import pytest
import torch
from torch import nn

from omniconv.layers.conv.separable import SeparableConv2d
from omniconv.models.factory import create_model
from omniconv.models.image.xception import XceptionConfig, XceptionModule


def test_thirty_six_convolutions_in_fourteen_modules():
    model = create_model("legacy_xception", device="meta")
    separable = [module for module in model.modules() if isinstance(module, SeparableConv2d)]
    shortcuts = [name for name, _ in model.named_modules() if name.endswith(".skip")]
    dense = [
        m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups == 1 and m.kernel_size == (3, 3)
    ]
    # The stem's two convolutions and the two last separable ones stand outside the twelve residual modules.
    assert (len(separable), len(dense), len(shortcuts)) == (34, 2, 12)
    assert sum(p.numel() for p in model.parameters()) == 22_855_952


def test_maps_follow_figure_5():
    model = create_model("legacy_xception", device="meta")
    maps = model.forward_stages(torch.empty(1, 3, 299, 299, device="meta"))
    wanted = [(64, 147), (128, 74), (256, 37), (728, 19), (2048, 10)]
    assert [(fmap.shape[1], fmap.shape[2]) for fmap in maps] == wanted


def test_a_module_leaves_its_input_for_the_shortcut():
    module = XceptionModule(XceptionConfig(), (6, 6, 6, 6), 1).eval()
    x = torch.randn(2, 6, 5, 7)
    kept = x.clone()
    y = module(x)
    torch.testing.assert_close(x, kept, rtol=0, atol=0)
    torch.testing.assert_close(y - x, module.rep(x))


def test_unknown_activation():
    with pytest.raises(ValueError, match="act must be one of"):
        XceptionConfig(act="gelu")
