"""WaveMix against the authors' counts and names, and a block written out."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from omniconv.models.factory import create_model
from omniconv.models.image.wavemix import OFFICIAL_NAMES, WaveMixBlock, WaveMixConfig
from omniconv.models.weights import rename


@pytest.mark.parametrize(
    ("name", "channels", "parameters"),
    [
        ("wavemix_lite_8_10_up", 1, 3_566),
        ("wavemix_lite_8_5", 1, 7_156),
        ("wavemix_lite_32_7_up", 3, 37_058),
        ("wavemix_lite_64_6", 3, 520_106),
    ],
)
def test_published_counts(name, channels, parameters):
    model = create_model(name, num_classes=10, in_chans=channels, device="meta")
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_a_block_of_two_levels_written_out():
    torch.manual_seed(0)
    block = WaveMixBlock(WaveMixConfig(8, levels=2)).double().eval()
    x = torch.randn(2, 8, 8, 12, dtype=torch.float64)

    def transform(y):
        """Bands by strided convolution, approximation first, then the three details of each channel."""
        signs = [[[1, 1], [1, 1]], [[1, 1], [-1, -1]], [[1, -1], [1, -1]], [[1, -1], [-1, 1]]]
        filters = torch.tensor(signs, dtype=torch.float64)[:, None] / 2
        bands = F.conv2d(y, filters.repeat(y.shape[1], 1, 1, 1), stride=2, groups=y.shape[1])
        bands = bands.unflatten(1, (-1, 4))
        return bands[:, :, 0], bands[:, :, 1:].flatten(1, 2)

    def feed(layers, z):
        z = F.conv2d(z, layers[0].weight, layers[0].bias)
        z = F.conv2d(F.gelu(z), layers[3].weight, layers[3].bias)
        z = F.conv_transpose2d(z, layers[4].weight, layers[4].bias, stride=2, padding=1)
        return z / (1 + layers[5].eps) ** 0.5

    low1, high1 = transform(F.conv2d(x, block.reduction.weight, block.reduction.bias))
    low2, high2 = transform(low1)
    coarse = feed(block.feedforward["2"], torch.cat((low2, high2), 1))
    fine = feed(block.feedforward["1"], torch.cat((low1, high1, coarse), 1))
    torch.testing.assert_close(block(x), x + fine)


def test_odd_sizes_keep_their_shape():
    block = WaveMixBlock(WaveMixConfig(8, levels=3)).eval()
    assert block(torch.randn(1, 8, 7, 13)).shape == (1, 8, 7, 13)


@pytest.mark.parametrize("levels", [1, 2])
def test_official_names_become_ours(levels):
    block = [("reduction.weight", 0), ("reduction.bias", 0)]
    for level in range(1, levels + 1):
        feedforward = "feedforward" if levels == 1 else f"feedforward{level}"
        block += [(f"{feedforward}.{place}.{kind}", 0) for place in (0, 3, 4) for kind in ("weight", "bias")]
        kinds = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        block += [(f"{feedforward}.5.{kind}", 0) for kind in kinds]
    official = [f"layers.{index}.{name}" for index in range(2) for name, _ in block]
    official += [f"conv.{place}.{kind}" for place in (0, 1) for kind in ("weight", "bias")]
    official += ["pool.2.weight", "pool.2.bias"]
    model = create_model("wavemix_up_test", levels=levels, upsample="deconv")
    assert set(rename(dict.fromkeys(official, torch.zeros(())), OFFICIAL_NAMES)) == set(model.state_dict())


def test_interpolation_has_no_weights():
    model = create_model("wavemix_up_test")
    assert not any(isinstance(module, nn.ConvTranspose2d) for module in model.modules())
