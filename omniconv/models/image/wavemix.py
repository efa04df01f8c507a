"""WaveMix: places are mixed by a wavelet transform, which has no weights, and come back by transposed convolutions.

Paper: Jeevan et al., https://arxiv.org/abs/2205.14375. WaveMix-Lite is the form of one level; its smallest networks
enlarge maps by interpolation instead. A map of odd size, which the authors' code refuses, gets the transform's zero
at its end and loses it again on the way back. `OFFICIAL_NAMES` leads from the names of the authors' package.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.models.backbone import Backbone, Feature, FeatureInfo, Variant
from omniconv.models.weights import Rules
from omniconv.ops.haar import haar_dwt2d

__all__ = ["WaveMix", "WaveMixConfig"]

OFFICIAL_NAMES: Rules = (
    (r"\.feedforward\.(?=\d)", ".feedforward1."),
    (r"\.feedforward(\d)\.", r".feedforward.\1."),
    (r"^pool\.2\.", "head."),
)


@dataclass(frozen=True)
class WaveMixConfig:
    """What tells one WaveMix from another.

    Attributes:
        width: channels C of every map, divisible by 4.
        depth: blocks.
        levels: of the wavelet transform in every block.
        mult: the feed-forward layers are `mult` C channels wide.
        upsample: how they return to the finer map, by a transposed convolution ("deconv") or by bilinear
            interpolation.
        stem: two 3x3 convolutions of stride `stride` ("conv"), or two of stride 1 and a `stride` x `stride` patch
            embedding with GELU and batch norm ("patch").
        stride: of the stem.
        drop_rate: dropout inside the feed-forward layers.
    """

    width: int = 192
    depth: int = 16
    levels: int = 3
    mult: int = 2
    upsample: Literal["deconv", "bilinear"] = "deconv"
    stem: Literal["conv", "patch"] = "patch"
    stride: int = 4
    drop_rate: float = 0.5

    def __post_init__(self) -> None:
        if self.width % 4:
            raise ValueError(f"width must be divisible by 4: got {self.width}")


class FeedForward(nn.Sequential):
    """Mixes the channels of the bands and brings them to the size of the finer map."""

    def __init__(self, config: WaveMixConfig, in_channels: int, out_channels: int) -> None:
        hidden, width = config.mult * config.width, config.width
        bilinear = config.upsample == "bilinear"
        super().__init__(
            nn.Conv2d(in_channels, hidden, 1),
            nn.GELU(),
            nn.Dropout(config.drop_rate),
            nn.Conv2d(hidden, out_channels if bilinear else width, 1),
            nn.Identity() if bilinear else nn.ConvTranspose2d(width, out_channels, 4, 2, 1),
            nn.BatchNorm2d(out_channels),
        )
        self.bilinear = bilinear

    def forward(self, z: Tensor, size: tuple[int, int]) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the map of `size` pixels."""
        *mix, up, norm = self
        for layer in mix:
            z = layer(z)
        if self.bilinear:
            return norm(F.interpolate(z, size=size, mode="bilinear"))
        return norm(up(z))[..., : size[0], : size[1]]


class WaveMixBlock(nn.Module):
    r"""Wavelet transform of a quarter of the channels, feed-forward layers from the coarsest level to the finest.

    .. math:: y = x + z_1, \qquad z_l = F_l([a_l, d_l, z_{l+1}]), \qquad (a_l, d_l) = \mathrm{DWT}(a_{l-1}), \qquad
              a_0 = W x
    """

    def __init__(self, config: WaveMixConfig) -> None:
        super().__init__()
        width = config.width
        self.reduction = nn.Conv2d(width, width // 4, 1)
        self.feedforward = nn.ModuleDict()
        for level in range(1, config.levels + 1):
            coarser = width // 2 if level < config.levels else 0
            self.feedforward[str(level)] = FeedForward(
                config, width + coarser, width if level == 1 else width // 2
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, of the shape of `x`."""
        low, bands = self.reduction(x), []
        for _ in self.feedforward:
            low, high = haar_dwt2d(low)
            bands.append(torch.cat((low, high.flatten(1, 2)), 1))
        maps = [x, *bands]
        y = None
        for level in range(len(bands), 0, -1):
            z = maps[level] if y is None else torch.cat((maps[level], y), 1)
            y = self.feedforward[str(level)](z, maps[level - 1].shape[2:])
        assert y is not None
        return y + x


class WaveMix(Backbone):
    """Wavelet network of `WaveMix <https://arxiv.org/abs/2205.14375>`_, of one width and resolution throughout.

    Args:
        config: which one.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.

    Shapes:
        - input: :math:`(N, C, H, W)`
        - output: :math:`(N, K)`
    """

    def __init__(
        self, config: WaveMixConfig = WaveMixConfig(), num_classes: int = 1000, in_chans: int = 3
    ) -> None:
        super().__init__()
        self.config = config
        width, stride = config.width, config.stride
        if config.stem == "conv":
            layers = [
                nn.Conv2d(in_chans, width // 2, 3, stride, 1),
                nn.Conv2d(width // 2, width, 3, stride, 1),
            ]
            reduction = stride**2
        else:
            layers = [
                nn.Conv2d(in_chans, width // 4, 3, 1, 1),
                nn.Conv2d(width // 4, width // 2, 3, 1, 1),
                nn.Conv2d(width // 2, width, stride, stride),
                nn.GELU(),
                nn.BatchNorm2d(width),
            ]
            reduction = stride
        self.conv = nn.Sequential(*layers)
        self.layers = nn.Sequential(*(WaveMixBlock(config) for _ in range(config.depth)))
        self.num_features = width
        self.feature_info = FeatureInfo([Feature(num_chs=width, reduction=reduction, module="layers")])
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new classifier for `num_classes` in place; 0 leaves none."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.head

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """Return the map of the last block, the only one."""
        return [self.layers(self.conv(x))]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits of a feature map, or the pooled features if `pre_logits`."""
        x = x.mean((2, 3))
        return x if pre_logits else self.head(x)


def _lite(width: int, depth: int, upsample: Literal["deconv", "bilinear"], params: float | None) -> Variant:
    config = WaveMixConfig(width, depth, 1, upsample=upsample, stem="conv", stride=1)
    return Variant(WaveMix, config, params, size=32, classes=10, source="the authors' repository")


VARIANTS = {
    "wavemix_192_16_level3": Variant(WaveMix, WaveMixConfig(), 28e6, source="the authors' repository"),
    # Published with one input channel: 3,566 and 7,156 parameters.
    "wavemix_lite_8_10_up": _lite(8, 10, "bilinear", None),
    "wavemix_lite_8_5": _lite(8, 5, "deconv", None),
    "wavemix_lite_16_7": _lite(16, 7, "deconv", None),
    "wavemix_lite_32_7_up": _lite(32, 7, "bilinear", 37_058),
    "wavemix_lite_64_6": _lite(64, 6, "deconv", 520_106),
    "wavemix_test": Variant(WaveMix, WaveMixConfig(16, 2, 3, stride=2), size=32),
    "wavemix_up_test": Variant(
        WaveMix,
        WaveMixConfig(32, 2, 2, upsample="bilinear", stem="conv", stride=1, drop_rate=0.1),
        size=32,
    ),
}
