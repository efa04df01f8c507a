"""Window attention against a pixel at a time."""

import math

import pytest
import torch
from torch import Tensor

from omniconv.layers.attention.window import WindowAttention


def by_pixel(layer: WindowAttention, x: Tensor) -> Tensor:
    """Return the layer's output, one query of one head after another."""
    size, shift, heads = layer.window_size, layer.shift, layer.num_heads
    _, _, height, width = x.shape
    q, k, v = (y.unflatten(1, (heads, -1)) for y in (layer.q(x), *layer.kv(x).chunk(2, 1)))
    out = torch.zeros_like(q)

    def window(place: int, length: int) -> list[int]:
        start = (place - shift) // size * size + shift
        return [other for other in range(start, start + size) if 0 <= other < length]

    for n in range(len(x)):
        for head in range(heads):
            bias = layer.bias if layer.bias.ndim == 2 else layer.bias[head]
            for i in range(height):
                for j in range(width):
                    keys = [(a, b) for a in window(i, height) for b in window(j, width)]
                    logits = [
                        q[n, head, :, i, j] @ k[n, head, :, a, b] / math.sqrt(q.shape[2])
                        + bias[a - i + size - 1, b - j + size - 1]
                        for a, b in keys
                    ]
                    share = torch.stack(logits).softmax(0)
                    out[n, head, :, i, j] = share @ torch.stack([v[n, head, :, a, b] for a, b in keys])
    return layer.proj(out.flatten(1, 2))


@pytest.mark.parametrize(("size", "shift", "shared"), [(3, 0, True), (4, 2, False)])
@torch.no_grad()
def test_windows_equal_a_pixel_at_a_time(size, shift, shared):
    torch.manual_seed(0)
    layer = WindowAttention(4, 6, num_heads=2, window_size=size, shift=shift, shared_bias=shared).double()
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(1, 4, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), by_pixel(layer, x))
