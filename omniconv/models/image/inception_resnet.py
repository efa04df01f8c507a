"""Inception-ResNet v1 and v2: Inception blocks as small residuals of a wide map.

Paper: Szegedy et al., https://arxiv.org/abs/1602.07261, figures 10 to 20. Every block's branches are joined by a 1x1
convolution without activation, scaled down, and added to the block's input. `inception_resnet_v2` is the network
of the public weights (TensorFlow's slim, twice as deep as the paper says); the paper's own have
`inception_resnet_v1` and `inception_resnet_v2_paper` for names. Parameter names are those of the public weights.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

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
from omniconv.models.image.inception_v4 import v4_stem

__all__ = ["InceptionResNet", "InceptionResNetConfig", "InceptionResidual"]


@dataclass(frozen=True)
class InceptionResNetConfig:
    """What tells one Inception-ResNet from another.

    Attributes:
        version: widths of the blocks: 1 (figures 10 to 13) or 2 (figures 16 to 19).
        depths: residual blocks at 35, 17 and 8 pixels.
        scales: by which the residuals of each stage are multiplied.
        stem: "v1" (figure 14, 256 channels), "v4" (figure 3, 384), "slim" (that of Inception-v3 and a block of
            branches, 320), or one "3x3" convolution of stride 1 for images of about 32 pixels.
        head_width: a last block without ReLU and a 1x1 convolution to so many channels follow; None for neither.
        width: multiplies all channels.
        drop_rate: dropout before the classifier.
    """

    version: Literal[1, 2] = 2
    depths: tuple[int, int, int] = (5, 10, 5)
    scales: tuple[float, float, float] = (0.17, 0.1, 0.2)
    stem: Literal["v1", "v4", "slim", "3x3"] = "v4"
    head_width: int | None = None
    width: float = 1.0
    drop_rate: float = 0.2


_RESIDUALS: dict[int, tuple[Branches, Branches, Branches]] = {
    1: (
        {"branch0": ((32, 1),), "branch1": ((32, 1), (32, 3)), "branch2": ((32, 1), (32, 3), (32, 3))},
        {"branch0": ((128, 1),), "branch1": ((128, 1), (128, (1, 7)), (128, (7, 1)))},
        {"branch0": ((192, 1),), "branch1": ((192, 1), (192, (1, 3)), (192, (3, 1)))},
    ),
    2: (
        {"branch0": ((32, 1),), "branch1": ((32, 1), (32, 3)), "branch2": ((32, 1), (48, 3), (64, 3))},
        {"branch0": ((192, 1),), "branch1": ((128, 1), (160, (1, 7)), (192, (7, 1)))},
        {"branch0": ((192, 1),), "branch1": ((192, 1), (224, (1, 3)), (256, (3, 1)))},
    ),
}


def _reductions(k: int, l: int, m: int, n: int, third: int, last: int) -> tuple[Branches, Branches]:  # noqa: E741
    return (
        {"branch0": ((n, 3, 2),), "branch1": ((k, 1), (l, 3), (m, 3, 2)), "branch2": ("max",)},
        {
            "branch0": ((256, 1), (384, 3, 2)),
            "branch1": ((256, 1), (third, 3, 2)),
            "branch2": ((256, 1), (third, 3), (last, 3, 2)),
            "branch3": ("max",),
        },
    )


_REDUCTIONS = {
    1: _reductions(192, 192, 256, 384, 256, 256),
    2: _reductions(256, 256, 384, 384, 288, 320),
}

_MIXED_5B: Branches = {
    "branch0": ((96, 1),),
    "branch1": ((48, 1), (64, 5)),
    "branch2": ((64, 1), (96, 3), (96, 3)),
    "branch3": ("avg", (64, 1)),
}


class InceptionResidual(Mixed):
    r"""Residual Inception block of `Inception-ResNet <https://arxiv.org/abs/1602.07261>`_, section 3.3.

    .. math:: y = \mathrm{ReLU}(x + s\, (W [b_1(x), b_2(x), \ldots] + b))

    Args:
        channels: of input and output.
        branches: the table of the branches.
        scale: s, 0.1 to 0.3 in the paper; without it, networks of more than 1000 channels die.
        width: multiplies the channels of the branches.
        last: leave out the ReLU.

    Shapes:
        - input and output: :math:`(N, C, H, W)`
    """

    def __init__(
        self, channels: int, branches: Branches, scale: float, width: float = 1.0, *, last: bool = False
    ) -> None:
        super().__init__(channels, branches, width)
        self.conv2d = nn.Conv2d(self.out_channels, channels, 1)
        self.scale = scale
        self.act = nn.Identity() if last else nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        return self.act(x + self.scale * self.conv2d(super().forward(x)))


class InceptionResNet(InceptionNetwork):
    """Network of `Inception-ResNet <https://arxiv.org/abs/1602.07261>`_.

    Images smaller than 75 pixels, of which the unpadded layers would leave nothing, get a border of zeros.

    Args:
        config: which one.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.

    Shapes:
        - input: :math:`(N, C, H, W)`
        - output: :math:`(N, K)`
    """

    classifier = "classif"

    def __init__(
        self,
        config: InceptionResNetConfig = InceptionResNetConfig(),
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        self.config = config
        width = config.width
        layers, maps, channels = _make_stem(config, in_chans)
        reduction, windows = (1, ()) if config.stem == "3x3" else (8, STEM_WINDOWS)

        residuals = _RESIDUALS[config.version]
        for stage, suffix in enumerate(("", "_1", "_2")):
            if stage > 0:
                entry = Mixed(channels, _REDUCTIONS[config.version][stage - 1], width)
                layers[f"mixed_{5 + stage}a"], channels = entry, entry.out_channels
            make = partial(InceptionResidual, channels, residuals[stage], config.scales[stage], width)
            layers[f"repeat{suffix}"] = nn.Sequential(*(make() for _ in range(config.depths[stage])))
            maps[f"repeat{suffix}"] = (channels, reduction)
            reduction *= 2
        if config.head_width:
            name, (_, stride) = maps.popitem()
            layers["block8"] = InceptionResidual(channels, residuals[2], 1.0, width, last=True)
            out = scale_channels(config.head_width, width)
            layers["conv2d_7b"], channels = ConvNorm(channels, out, 1), out
            maps["conv2d_7b"] = (channels, stride)

        for name, layer in layers.items():
            self.add_module(name, layer)
        self.assemble(layers, maps, (*windows, (3, 2), (3, 2)), num_classes, config.drop_rate)
        self.init_weights()


def _make_stem(
    config: InceptionResNetConfig, in_chans: int
) -> tuple[dict[str, nn.Module], dict[str, tuple[int, int]], int]:
    """Return a stem's layers, the maps among them (channels and reduction), and its channels."""
    scaled = partial(scale_channels, width=config.width)
    if config.stem == "3x3":
        channels = scaled(320)
        return {"conv2d_1a": ConvNorm(in_chans, channels, 3)}, {}, channels
    if config.stem == "v4":
        modules, counts = v4_stem(in_chans, config.width)
        names = ("conv2d_1a", "conv2d_2a", "conv2d_2b", "mixed_3a", "mixed_4a", "mixed_5a")
        maps = {"conv2d_2b": (counts[2], 2), "mixed_3a": (counts[3], 4)}
        return dict(zip(names, modules, strict=True)), maps, counts[-1]
    first, second, third, fourth = (scaled(channels) for channels in (32, 64, 80, 192))
    layers: dict[str, nn.Module] = {
        "conv2d_1a": ConvNorm(in_chans, first, 3, 2),
        "conv2d_2a": ConvNorm(first, first, 3, valid=True),
        "conv2d_2b": ConvNorm(first, second, 3),
        "maxpool_3a": nn.MaxPool2d(3, 2),
        "conv2d_3b": ConvNorm(second, third, 1),
        "conv2d_4a": ConvNorm(third, fourth, 3, valid=True),
    }
    maps = {"conv2d_2b": (second, 2), "conv2d_4a": (fourth, 4)}
    if config.stem == "v1":
        layers["conv2d_4b"] = ConvNorm(fourth, scaled(256), 3, 2)
        return layers, maps, scaled(256)
    layers["maxpool_5a"] = nn.MaxPool2d(3, 2)
    mixed = Mixed(fourth, _MIXED_5B, config.width)
    layers["mixed_5b"] = mixed
    return layers, maps, mixed.out_channels


VARIANTS = {
    "inception_resnet_v1": Variant(InceptionResNet, InceptionResNetConfig(1, stem="v1"), size=299),
    "inception_resnet_v2_paper": Variant(InceptionResNet, InceptionResNetConfig(2, stem="v4"), size=299),
    "inception_resnet_v2": Variant(
        InceptionResNet,
        InceptionResNetConfig(2, (10, 20, 9), stem="slim", head_width=1536),
        55.84e6, 13.18e9, 299, source="timm's model cards",
    ),
    "inception_resnet_test": Variant(
        InceptionResNet,
        InceptionResNetConfig(1, (1, 1, 1), stem="3x3", head_width=256, width=0.04),
        size=32, classes=10,
    ),
}  # fmt: skip
