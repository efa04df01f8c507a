"""Dynamic convolutions against torch's convolutions, one sample at a time, and against self-attention."""

import pytest
import torch
from torch.nn import functional as F

from omniconv.layers.attention.dynconv_attention import (
    DepthwiseDynamicConv2d,
    DynamicConvAttention,
    dynamic_pointwise,
)
from omniconv.layers.attention.self_attention import SelfAttention


def test_every_sample_has_a_kernel_of_its_own():
    x, kernel = torch.randn(3, 4, 7, dtype=torch.float64), torch.randn(3, 5, 4, dtype=torch.float64)
    expected = torch.stack([F.conv1d(sample, w[:, :, None]) for sample, w in zip(x, kernel, strict=True)])
    torch.testing.assert_close(dynamic_pointwise(x, kernel), expected)


@pytest.mark.parametrize("heads", [1, 4])
def test_with_softmax_it_is_self_attention(heads):
    torch.manual_seed(0)
    layer, attention = DynamicConvAttention(8, heads).double(), SelfAttention(8, heads).double()
    layer.load_state_dict(attention.state_dict())
    x = torch.randn(2, 9, 8, dtype=torch.float64, requires_grad=True)
    probe = torch.randn(2, 9, 8, dtype=torch.float64)
    results = []
    for form in (layer, attention):
        y = form(x)
        results.append([y, *torch.autograd.grad((y * probe).sum(), [x, *form.parameters()])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@torch.no_grad()
def test_relu_and_layer_norm_stand_between_the_convolutions():
    torch.manual_seed(0)
    layer = DynamicConvAttention(6, 1, "relu", "layer").double()
    x = torch.randn(1, 5, 6, dtype=torch.float64)
    q, k, v = layer.qkv(x[0]).chunk(3, -1)
    expected = torch.empty(5, 6, dtype=torch.float64)
    for place in range(5):
        mix = torch.relu(k @ q[place] / 6**0.5)
        expected[place] = (mix - mix.mean()) / (mix.var(correction=0) + 1e-5).sqrt() @ v
    torch.testing.assert_close(layer(x)[0], layer.proj(expected))


@torch.no_grad()
def test_depthwise_kernels_are_pooled_keys():
    torch.manual_seed(0)
    layer = DepthwiseDynamicConv2d(2, 3).double()
    x, source = torch.randn(2, 2, 2, 6, 9, dtype=torch.float64)
    keys = layer.key(source).reshape(2, 2, 3, 2, 3, 3).mean((3, 5))
    kernels = torch.exp(keys) / torch.exp(keys).sum((2, 3), keepdim=True)
    padded = F.pad(layer.value(x), (1, 1, 1, 1))
    expected = sum(
        kernels[:, :, i, j, None, None] * padded[:, :, i : i + 6, j : j + 9]
        for i in range(3)
        for j in range(3)
    )
    torch.testing.assert_close(layer(x, source), layer.proj(expected))
