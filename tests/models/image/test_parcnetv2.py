"""ParCNetV2 at other sizes, its norm, and the official names."""

import pytest
import torch
from torch import nn

from omniconv.models.factory import create_model
from omniconv.models.image.parcnetv2 import OFFICIAL_NAMES, ParCNetV2Config, UnitNorm2d
from tests.models.image.names import assert_become_ours, layer


def test_stretched_kernels_are_the_kernels_at_the_size_they_are_for():
    torch.manual_seed(0)
    stretched = create_model("parcnetv2_test", num_classes=5).eval()
    for parameter in stretched.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    plain = create_model("parcnetv2_test", num_classes=5, resize_kernels=False).eval()
    plain.load_state_dict(stretched.state_dict())
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(plain(x), stretched(x))
    x = torch.randn(1, 3, 64, 48)
    assert (plain(x) - stretched(x)).abs().max() > 0.01


def test_the_norm_gives_vectors_of_length_one_about_zero():
    torch.manual_seed(0)
    y = UnitNorm2d(6)(3 + 7 * torch.randn(2, 6, 3, 5))
    torch.testing.assert_close(y.norm(dim=1), torch.ones(2, 3, 5))
    torch.testing.assert_close(y.sum(1), torch.zeros(2, 3, 5), rtol=0, atol=1e-5)


def test_official_names():
    options = {"depths": (1, 1, 1), "widths": (8, 8, 8), "kernel_sizes": (15, 7, 3)}
    official = layer("downsample_layers.0.conv", "norm", "head")
    official += layer("downsample_layers.0.post_norm", bias=False)
    for stage in range(3):
        if stage:
            official += layer(f"downsample_layers.{stage}.conv")
            official += layer(f"downsample_layers.{stage}.pre_norm", bias=False)
        block = f"stages.{stage}.0"
        official += layer(f"{block}.token_mixer.pwconv1", f"{block}.mlp.fc1")
        mixer = ("dwconv1.conv_h", "dwconv1.conv_w", "dwconv2", "pwconv2")
        parts = ("norm1", "norm2", "mlp.fc2", *(f"token_mixer.{part}" for part in mixer))
        official += layer(*(f"{block}.{part}" for part in parts), bias=False)
    official += ["stages.2.0.res_scale1.scale", "stages.2.0.res_scale2.scale"]
    assert_become_ours(official, OFFICIAL_NAMES, create_model("parcnetv2_test", device="meta", **options))


def test_every_stage_needs_its_kernel_size():
    with pytest.raises(ValueError, match="depths and kernel_sizes must be equally long"):
        ParCNetV2Config(kernel_sizes=(3,))
