"""ResNeSt: ResNet-D whose 3x3 convolutions are split-attention convolutions.

Paper: Zhang et al., ResNeSt: Split-Attention Networks, https://arxiv.org/abs/2004.08955. Stems, shortcuts and the
skeleton are those of `omniconv.models.image.resnet`. Parameter names are those of the public weights.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from omniconv.layers.conv.split_attention import SplitAttentionConv2d
from omniconv.models.backbone import Variant
from omniconv.models.image.resnet import ResNet
from omniconv.models.image.resnet_blocks import ResidualBlock, ResNetConfig

__all__ = ["ResNeStConfig", "SplitAttentionBlock"]


@dataclass(frozen=True)
class ResNeStConfig(ResNetConfig):
    """What tells one ResNeSt from another, beside the fields of `ResNetConfig`.

    Attributes:
        radix: splits that each convolution mixes.
        pool_first: average before the convolution where the resolution changes, instead of behind it (the fast
            form).
    """

    stem: Literal["7x7", "deep", "tiered", "rs", "spd", "3x3"] = "deep"
    shortcut: Literal["conv", "pool", "pad"] = "pool"
    radix: int = 2
    pool_first: bool = False

    @property
    def block(self) -> Any:
        """The class of the blocks."""
        return SplitAttentionBlock


class SplitAttentionBlock(ResidualBlock):
    """1x1 reduce, a split-attention 3x3, 1x1 expand; 3x3 average pooling carries the stride."""

    expansion = 4
    last_norm = "bn3"

    def __init__(
        self,
        config: ResNeStConfig,
        in_channels: int,
        width: int,
        stride: int,
        stage: int,
        drop: float,
        index: int = 0,
    ) -> None:
        super().__init__()
        inner = width * config.base_width // 64 * config.cardinality
        out = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.bn1 = config.make_first_norm(inner, stage)
        self.act1 = config.make_act()
        pool = nn.AvgPool2d(3, stride, 1) if stride > 1 else nn.Identity()
        self.avd_first = pool if config.pool_first else nn.Identity()
        self.conv2 = SplitAttentionConv2d(inner, inner, groups=config.cardinality, radix=config.radix)
        self.avd_last = nn.Identity() if config.pool_first else pool
        self.conv3 = nn.Conv2d(inner, out, 1, bias=False)
        self.bn3 = config.make_norm(out)
        self.finish(config, in_channels, out, stride, stage, drop, index)

    def residual(self, x: Tensor) -> Tensor:
        """Return what is added to the shortcut."""
        y = self.avd_first(self.act1(self.bn1(self.conv1(x))))
        y = self.avd_last(self.conv2(y))
        return self.bn3(self.conv3(y))


_D50 = (3, 4, 6, 3)
_e = partial(ResNeStConfig, stem_width=64)
_fast = partial(ResNeStConfig, _D50, pool_first=True)
_TIMM = "timm's model cards"
_ABLATION = "the authors' ablation table"


def _row(
    config: ResNeStConfig,
    params: float | None = None,
    macs: float | None = None,
    source: str = "",
    size: int = 224,
) -> Variant:
    return Variant(ResNet, config, params, macs, size=size, source=source)


VARIANTS = {
    "resnest14d": _row(ResNeStConfig((1, 1, 1, 1)), 10.6e6, 2.76e9, _TIMM),
    "resnest26d": _row(ResNeStConfig((2, 2, 2, 2)), 17.1e6, 3.64e9, _TIMM),
    "resnest50d": _row(ResNeStConfig(_D50), 27.5e6, 5.39e9),
    "resnest101e": _row(_e((3, 4, 23, 3)), 48.3e6, 10.2e9),
    "resnest200e": _row(_e((3, 24, 36, 3)), 70.2e6),
    "resnest269e": _row(_e((3, 30, 48, 8)), 110.9e6),
    "resnest50d_fast": _row(_fast(), 27.5e6, 4.34e9),
    "resnest50d_1s4x24d": _row(_fast(cardinality=4, base_width=24, radix=1), 25.7e6, 4.42e9, _ABLATION),
    "resnest50d_4s2x40d": _row(_fast(cardinality=2, base_width=40, radix=4), 30.4e6, 4.41e9, _ABLATION),
    "resnest_test": Variant(
        ResNet,
        ResNeStConfig((1, 1), (16, 16), stem_width=8, cardinality=2, base_width=32),
        size=32,
        classes=10,
    ),
}
