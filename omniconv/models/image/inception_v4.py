"""Inception-v4: one uniform design for the blocks of every resolution, without shortcuts.

Paper: Szegedy et al., Inception-v4, Inception-ResNet and the Impact of Residual Connections on Learning,
https://arxiv.org/abs/1602.07261, figures 3 to 9. Its residual networks are in `inception_resnet`. Parameter names
are those of the public weights.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from omniconv.models.backbone import Variant
from omniconv.models.image.inception import (
    STEM_WINDOWS,
    Branches,
    ConvNorm,
    InceptionNetwork,
    Mixed,
    scale_channels,
)

__all__ = ["InceptionV4", "InceptionV4Config", "v4_stem"]


@dataclass(frozen=True)
class InceptionV4Config:
    """What tells one Inception-v4 from another.

    Attributes:
        depths: Inception-A, -B and -C blocks.
        width: multiplies all channels.
        stem: "deep" (three halvings, unpadded), or one "3x3" convolution of stride 1 for images of about 32 pixels.
        drop_rate: dropout before the classifier.
    """

    depths: tuple[int, int, int] = (4, 7, 3)
    width: float = 1.0
    stem: Literal["deep", "3x3"] = "deep"
    drop_rate: float = 0.2


_MIXED_3A: Branches = {"maxpool": ("max",), "conv": ((96, 3, 2),)}
_MIXED_5A: Branches = {"conv": ((192, 3, 2),), "maxpool": ("max",)}

_INCEPTION_A: Branches = {
    "branch0": ((96, 1),),
    "branch1": ((64, 1), (96, 3)),
    "branch2": ((64, 1), (96, 3), (96, 3)),
    "branch3": ("avg", (96, 1)),
}
_REDUCTION_A: Branches = {
    "branch0": ((384, 3, 2),),
    "branch1": ((192, 1), (224, 3), (256, 3, 2)),
    "branch2": ("max",),
}
_INCEPTION_B: Branches = {
    "branch0": ((384, 1),),
    "branch1": ((192, 1), (224, (1, 7)), (256, (7, 1))),
    "branch2": ((192, 1), (192, (7, 1)), (224, (1, 7)), (224, (7, 1)), (256, (1, 7))),
    "branch3": ("avg", (128, 1)),
}
_REDUCTION_B: Branches = {
    "branch0": ((192, 1), (192, 3, 2)),
    "branch1": ((256, 1), (256, (1, 7)), (320, (7, 1)), (320, 3, 2)),
    "branch2": ("max",),
}


class InceptionC(nn.Module):
    """The block at 8 pixels: two branches end in a 1x3 and a 3x1 convolution side by side (figure 6)."""

    def __init__(self, in_channels: int, width: float = 1.0) -> None:
        super().__init__()
        half, narrow, middle, wide = (scale_channels(channels, width) for channels in (256, 384, 448, 512))
        self.out_channels = 6 * half
        self.branch0 = ConvNorm(in_channels, half, 1)
        self.branch1_0 = ConvNorm(in_channels, narrow, 1)
        self.branch1_1a = ConvNorm(narrow, half, (1, 3))
        self.branch1_1b = ConvNorm(narrow, half, (3, 1))
        self.branch2_0 = ConvNorm(in_channels, narrow, 1)
        self.branch2_1 = ConvNorm(narrow, middle, (3, 1))
        self.branch2_2 = ConvNorm(middle, wide, (1, 3))
        self.branch2_3a = ConvNorm(wide, half, (1, 3))
        self.branch2_3b = ConvNorm(wide, half, (3, 1))
        pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        self.branch3 = nn.Sequential(pool, ConvNorm(in_channels, half, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the branches' maps side by side."""
        y = self.branch1_0(x)
        z = self.branch2_2(self.branch2_1(self.branch2_0(x)))
        maps = (
            self.branch0(x),
            self.branch1_1a(y), self.branch1_1b(y),
            self.branch2_3a(z), self.branch2_3b(z),
            self.branch3(x),
        )  # fmt: skip
        return torch.cat(maps, 1)


class Mixed4a(nn.Module):
    """The stem's block in which a 7x1 and a 1x7 convolution stand before the last, unpadded 3x3."""

    def __init__(self, in_channels: int, width: float = 1.0) -> None:
        super().__init__()
        narrow, out = scale_channels(64, width), scale_channels(96, width)
        self.out_channels = 2 * out
        self.branch0 = nn.Sequential(ConvNorm(in_channels, narrow, 1), ConvNorm(narrow, out, 3, valid=True))
        self.branch1 = nn.Sequential(
            ConvNorm(in_channels, narrow, 1),
            ConvNorm(narrow, narrow, (1, 7)),
            ConvNorm(narrow, narrow, (7, 1)),
            ConvNorm(narrow, out, 3, valid=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return both branches' maps side by side."""
        return torch.cat([self.branch0(x), self.branch1(x)], 1)


def v4_stem(in_chans: int, width: float = 1.0) -> tuple[list[nn.Module], list[int]]:
    """Return the six layers of figure 3 and the channels after each; the last ones are 384."""
    first, second = scale_channels(32, width), scale_channels(64, width)
    mixed_3a = Mixed(second, _MIXED_3A, width)
    mixed_4a = Mixed4a(mixed_3a.out_channels, width)
    mixed_5a = Mixed(mixed_4a.out_channels, _MIXED_5A, width)
    layers: list[nn.Module] = [
        ConvNorm(in_chans, first, 3, 2),
        ConvNorm(first, first, 3, valid=True),
        ConvNorm(first, second, 3),
        mixed_3a, mixed_4a, mixed_5a,
    ]  # fmt: skip
    channels = [first, first, second, *(block.out_channels for block in (mixed_3a, mixed_4a, mixed_5a))]
    return layers, channels


class InceptionV4(InceptionNetwork):
    """Network of `Inception-v4 <https://arxiv.org/abs/1602.07261>`_.

    Images smaller than 75 pixels, of which the unpadded layers would leave nothing, get a border of zeros.

    Args:
        config: which one.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.

    Shapes:
        - input: :math:`(N, C, H, W)`
        - output: :math:`(N, K)`
    """

    classifier = "last_linear"

    def __init__(
        self, config: InceptionV4Config = InceptionV4Config(), num_classes: int = 1000, in_chans: int = 3
    ) -> None:
        super().__init__()
        self.config = config
        channels, reduction = scale_channels(384, config.width), 1
        layers: list[nn.Module] = [ConvNorm(in_chans, channels, 3)]
        maps: dict[str, tuple[int, int]] = {}
        if config.stem == "deep":
            layers, counts = v4_stem(in_chans, config.width)
            maps = {"features.2": (counts[2], 2), "features.3": (counts[3], 4)}
            channels, reduction = counts[-1], 8

        blocks = (_INCEPTION_A, _INCEPTION_B, None)
        for entry, block, depth in zip(
            (None, _REDUCTION_A, _REDUCTION_B), blocks, config.depths, strict=True
        ):
            for table in ([entry] if entry else []) + [block] * depth:
                layer = Mixed(channels, table, config.width) if table else InceptionC(channels, config.width)
                channels = layer.out_channels
                layers.append(layer)
            maps[f"features.{len(layers) - 1}"] = (channels, reduction)
            reduction *= 2
        self.features = nn.Sequential(*layers)
        windows = STEM_WINDOWS if config.stem == "deep" else ()
        names = [f"features.{index}" for index in range(len(layers))]
        self.assemble(names, maps, (*windows, (3, 2), (3, 2)), num_classes, config.drop_rate)
        self.init_weights()


VARIANTS = {
    "inception_v4": Variant(
        InceptionV4, InceptionV4Config(), 42.68e6, 12.28e9, 299, source="timm's model cards"
    ),
    "inception_v4_test": Variant(
        InceptionV4, InceptionV4Config((1, 1, 1), width=0.04, stem="3x3"), size=32, classes=10
    ),
}
