"""Layers whose kind is known, told from their derivatives."""

import pytest
import torch
from torch import nn

from omniconv.inspect.mixing import MixingView, probe_mixing
from omniconv.layers.attention.dynconv_attention import DynamicConvAttention


def test_a_depthwise_convolution_is_static_and_the_same_everywhere():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 3, 5, padding=2, groups=3).double()
    assert probe_mixing(lambda x, source: conv(x), 3) == MixingView(5, False, True, 3)


def test_attention_has_a_kernel_a_place_and_a_head():
    torch.manual_seed(0)
    layer = DynamicConvAttention(4, 2).double()

    def mix(x, source):
        y = layer(x.flatten(2).mT, source.flatten(2).mT)
        return y.mT.unflatten(2, x.shape[2:])

    assert probe_mixing(mix, 4, (3, 4)) == MixingView(0, True, False, 2)


def test_a_function_that_generates_kernels_from_what_it_mixes_is_refused():
    with pytest.raises(ValueError, match="mix must be linear in x: generate kernels from source alone"):
        probe_mixing(lambda x, source: x**2, 2)
