"""GLMix against pooling and broadcasting by hand, and at two resolutions."""

import torch
from torch import nn
from torch.nn import functional as F

from omniconv.layers.attention.glmix import GLMix


def test_hard_clusters_are_averaged_mixed_and_broadcast():
    torch.manual_seed(0)
    layer = GLMix(8, 2, slots=4).double()
    nn.init.constant_(layer.scale, 200.0)
    corners = torch.eye(8, dtype=torch.float64)[:4]
    seeds = corners.T.view(1, 8, 2, 2).repeat_interleave(3, 2).repeat_interleave(4, 3)
    label = torch.randint(0, 4, (6, 8))
    length = torch.rand(6, 8, dtype=torch.float64) + 0.5
    x = (corners[label] * length[..., None]).permute(2, 0, 1)[None]
    slots = torch.stack([x[0, :, label == slot].mean(1) for slot in range(4)], 1)
    slots = layer.attention(slots.view(1, 8, 2, 2)).flatten(2)[0]
    expected = slots[:, label][None] + layer.local(x)
    torch.testing.assert_close(layer(x, seeds), expected)


def test_slots_do_not_depend_on_how_finely_a_map_is_sampled():
    torch.manual_seed(0)
    layer = GLMix(6, 3, slots=4)
    x, seeds = torch.randn(2, 2, 6, 4, 8)
    fine = layer.mix_slots(*(F.interpolate(y, scale_factor=3) for y in (x, seeds)))
    torch.testing.assert_close(fine, F.interpolate(layer.mix_slots(x, seeds), scale_factor=3))


def test_pixels_are_shared_out_among_slots_and_gathered_as_means():
    layer = GLMix(6, 3, slots=9)
    nn.init.constant_(layer.scale, 3.0)
    logits = layer.similarity(torch.randn(2, 6, 5, 7), torch.randn(2, 6, 5, 7))
    assert logits.shape == (2, 9, 35)
    assert logits.abs().max() <= 3.0 + 1e-5
