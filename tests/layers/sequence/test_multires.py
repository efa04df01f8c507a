"""Multiresolution convolution against its recursion in plain loops, the Haar transform by block sums, and itself
step by step."""

import math

import numpy as np
import pytest
import torch

from omniconv.layers.sequence.multires import MultiresConv, multires_depth


def slow(layer: MultiresConv, x: torch.Tensor) -> np.ndarray:
    """The equations of the docstring for one sequence (C, L), value by value."""
    filters, weight = (p.detach().numpy() for p in (layer.filters, layer.weight))
    a, (channels, length) = x.numpy(), x.shape
    y, place = weight[:, :1] * a, 2

    def at(signal, channel, t):
        return signal[channel, t] if t >= 0 else 0.0

    for level in range(1, layer.depth + 1):
        low, high = np.zeros_like(a), np.zeros_like(a)
        for c in range(channels):
            for t in range(length):
                for i in range(filters.shape[2]):
                    past = at(a, c, t - 2 ** (level - 1) * i)
                    low[c, t] += filters[c, 0, i] * past
                    high[c, t] += filters[c, 1, i] * past
        for i in range(layer.taps[level - 1]):
            for c in range(channels):
                for t in range(length):
                    y[c, t] += weight[c, place] * at(high, c, t - 2**level * i)
            place += 1
        a = low
    return y + weight[:, 1:2] * a


FORMS = [
    {"kernel_size": 2, "length": 20},
    {"kernel_size": 3, "length": 20, "memory_size": 6},
    {"kernel_size": 4, "length": 24, "memory_size": 100, "wavelet": True},
    {"kernel_size": 2, "length": 16, "memory_size": 2},
]


@pytest.mark.parametrize("options", FORMS)
def test_it_is_its_recursion(options):
    torch.manual_seed(0)
    layer = MultiresConv(2, **options).double()
    x = torch.randn(1, 2, 23, dtype=torch.float64)
    np.testing.assert_allclose(layer(x)[0].detach().numpy(), slow(layer, x[0]), atol=1e-12)


@pytest.mark.parametrize("options", FORMS)
def test_steps_equal_the_batch(options):
    torch.manual_seed(0)
    layer = MultiresConv(3, **options).double()
    x = torch.randn(2, 3, 60, dtype=torch.float64)
    state = layer.initial_state(2)
    steps = torch.stack([layer.step(x[:, :, t], state) for t in range(60)], 2)
    torch.testing.assert_close(steps, layer(x))


@pytest.mark.parametrize(("length", "kernel"), [(2, 2), (3, 2), (784, 2), (1024, 2), (1024, 4), (16384, 4)])
def test_the_tree_is_just_deep_enough(length, kernel):
    def reach(depth):
        return (kernel - 1) * (2**depth - 1) + 1

    depth = multires_depth(length, kernel)
    assert reach(depth) >= length > reach(depth - 1)


@pytest.mark.parametrize(("kernel", "length"), [(2, 784), (2, 1024), (4, 2048)])
def test_parameters_per_channel(kernel, length):
    depth = multires_depth(length, kernel)
    count = sum(p.numel() for p in MultiresConv(1, kernel, length).parameters())
    assert count == 2 * kernel + depth + 2


def test_a_uniform_memory_of_haar_filters_keeps_a_whole_basis():
    # 1 approximation and 1 + 2 + 4 + 8 details of 16 samples; a larger memory has nothing more to keep.
    layer = MultiresConv(1, 2, 16, memory_size=1000)
    assert layer.taps == [8, 4, 2, 1]
    assert MultiresConv(1, 2, 16, memory_size=6).taps == [0, 2, 2, 1]


def test_haar_details_are_differences_of_block_sums():
    layer = MultiresConv(1, 2, 32, wavelet=True).double()
    x = torch.randn(1, 1, 70, dtype=torch.float64)
    sums = np.concatenate([np.zeros(65), np.cumsum(x[0, 0].numpy())])
    now = np.arange(65, 65 + 70)
    for level in range(1, layer.depth + 1):
        torch.nn.init.zeros_(layer.weight)
        layer.weight.data[0, 1 + level] = 1
        half = 2 ** (level - 1)
        newer, older = sums[now] - sums[now - half], sums[now - half] - sums[now - 2 * half]
        expected = (older - newer) / math.sqrt(2.0) ** level
        np.testing.assert_allclose(layer(x)[0, 0].detach().numpy(), expected, atol=1e-12)


def test_wavelet_filters_are_orthonormal():
    for kernel in (2, 4):
        low, high = MultiresConv(1, kernel, 64, wavelet=True).double().filters[0].detach()
        torch.testing.assert_close(low.norm(), torch.ones(()).double(), atol=1e-6, rtol=0)
        assert abs(float(low @ high)) < 1e-6
        assert abs(float(high.sum())) < 1e-6
        # Daubechies' wavelets of k taps are blind to polynomials of degree k / 2 - 1.
        assert abs(float(high @ torch.arange(kernel).double() ** (kernel // 2 - 1))) < 1e-6
