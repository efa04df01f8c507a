"""Twins: windows and subsampling against loops over tokens."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from omniconv.models.factory import create_model
from omniconv.models.image.twins import SubsampledAttention, WindowAttention


@torch.no_grad()
def test_window_attention_is_attention_in_every_window():
    torch.manual_seed(0)
    layer = WindowAttention(8, 2, 3).double()
    x = torch.randn(2, 7, 5, 8, dtype=torch.float64)
    padded = F.pad(x, (0, 0, 0, 1, 0, 2))
    expected = torch.empty_like(padded)
    for top in range(0, 9, 3):
        for left in range(0, 6, 3):
            window = padded[:, top : top + 3, left : left + 3].reshape(2, 9, 8)
            q, k, v = layer.qkv(window).chunk(3, -1)
            heads = [
                torch.softmax(q[..., h] @ k[..., h].mT / 2, -1) @ v[..., h]
                for h in (slice(0, 4), slice(4, 8))
            ]
            expected[:, top : top + 3, left : left + 3] = layer.proj(torch.cat(heads, -1)).view(2, 3, 3, 8)
    torch.testing.assert_close(layer(x), expected[:, :7, :5])


@torch.no_grad()
def test_subsampled_attention_has_a_key_for_every_patch():
    torch.manual_seed(0)
    layer: Any = SubsampledAttention(8, 1, 2).double()
    x = torch.randn(1, 4, 6, 8, dtype=torch.float64)
    patches = x.reshape(1, 2, 2, 3, 2, 8).permute(0, 1, 3, 5, 2, 4).reshape(6, -1)
    small = layer.norm(patches @ layer.sr.weight.flatten(1).T + layer.sr.bias)
    k, v = layer.kv(small).chunk(2, -1)
    mixed = torch.softmax(layer.q(x.reshape(24, 8)) @ k.T / 8**0.5, -1) @ v
    torch.testing.assert_close(layer(x).reshape(24, 8), layer.proj(mixed))


@pytest.mark.parametrize("name", ["twins_svt_small", "twins_pcpvt_small"])
def test_anchoring_needs_no_other_weights(name):
    plain, anchored = (create_model(name, device="meta", anchored=anchored) for anchored in (False, True))
    assert {k: v.shape for k, v in plain.state_dict().items()} == {
        k: v.shape for k, v in anchored.state_dict().items()
    }


def test_stages_must_agree():
    with pytest.raises(ValueError, match=r"every stage needs one number of each: got .*'widths': 2"):
        create_model("twins_test", depths=(1,))
