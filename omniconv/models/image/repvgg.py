"""RepVGG: residual branches while it trains, a plain stack of 3x3 convolutions and ReLU when it is deployed.

Paper: Ding et al., https://arxiv.org/abs/2101.03697. `deploy()` returns the plain stack. Parameter names are
those of the public weights.
"""

from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor, nn

from omniconv.layers.attention.se import SqueezeExcite
from omniconv.layers.conv.rep_vgg_block import RepVGGBlock
from omniconv.models.backbone import Backbone, Feature, FeatureInfo, Variant

__all__ = ["RepVGG", "RepVGGConfig"]


@dataclass(frozen=True)
class RepVGGConfig:
    """What tells one RepVGG from another.

    Attributes:
        depths: blocks of each stage after the stem's single one.
        widths: channels of each stage.
        stem_width: channels of the stem.
        groups: of the convolutions in every second block of a stage ("g2", "g4").
        se_ratio: bottleneck of the squeeze-and-excitation gates as a share of the channels; 0 for no gates.
        drop_rate: dropout before the classifier.
    """

    depths: tuple[int, ...] = (2, 4, 14, 1)
    widths: tuple[int, ...] = (48, 96, 192, 1280)
    stem_width: int = 48
    groups: int = 1
    se_ratio: float = 0.0
    drop_rate: float = 0.0

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.widths):
            raise ValueError(f"depths and widths must be equally long: got {self.depths} and {self.widths}")


class RepVGG(Backbone):
    """Re-parameterizable plain network of `RepVGG <https://arxiv.org/abs/2101.03697>`_.

    Args:
        config: which one.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.

    Shapes:
        - input: :math:`(N, C, H, W)`
        - output: :math:`(N, K)`
    """

    def __init__(
        self, config: RepVGGConfig = RepVGGConfig(), num_classes: int = 1000, in_chans: int = 3
    ) -> None:
        super().__init__()
        self.config = config

        def make_block(in_channels: int, channels: int, stride: int, groups: int) -> RepVGGBlock:
            attn = SqueezeExcite(channels, int(channels * config.se_ratio)) if config.se_ratio else None
            return RepVGGBlock(in_channels, channels, stride=stride, groups=groups, attn=attn)

        channels, reduction = config.stem_width, 2
        self.stem = make_block(in_chans, channels, 2, 1)
        self.feature_info = FeatureInfo([Feature(num_chs=channels, reduction=2, module="stem")])
        stages = []
        for index, (depth, width) in enumerate(zip(config.depths, config.widths, strict=True)):
            blocks = []
            for position in range(depth):
                groups = config.groups if position % 2 else 1
                blocks.append(make_block(channels, width, 1 if position else 2, groups))
                channels = width
            stages.append(nn.Sequential(*blocks))
            reduction *= 2
            self.feature_info.append(Feature(num_chs=width, reduction=reduction, module=f"stages.{index}"))
        self.stages = nn.Sequential(*stages)

        self.num_features = channels
        pool, drop = nn.AdaptiveAvgPool2d(1), nn.Dropout(config.drop_rate)
        self.head = nn.Sequential(OrderedDict(global_pool=pool, flatten=nn.Flatten(1), drop=drop))
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new classifier for `num_classes` in place; 0 leaves none."""
        self.num_classes = num_classes
        self.head.add_module(
            "fc", nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        )

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.head.get_submodule("fc")

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """Return the stem's and every stage's feature map."""
        maps = [self.stem(x)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits of a feature map, or the pooled features if `pre_logits`."""
        return self.head[:-1](x) if pre_logits else self.head(x)


_A, _B = (2, 4, 14, 1), (4, 6, 16, 1)


def _row(depths: tuple[int, ...], a: float, b: float, params: float, macs: float, **options) -> Variant:
    """Return a network of widths 64, 128, 256 times `a` and 512 times `b`; the figures are those deployed."""
    widths = (int(64 * a), int(128 * a), int(256 * a), int(512 * b))
    config = RepVGGConfig(depths, widths, min(64, int(64 * a)), **options)
    return Variant(RepVGG, config, params, macs, deployed=True)


VARIANTS = {
    "repvgg_a0": _row(_A, 0.75, 2.5, 8.30e6, 1.4e9),
    "repvgg_a1": _row(_A, 1, 2.5, 12.78e6, 2.4e9),
    "repvgg_a2": _row(_A, 1.5, 2.75, 25.49e6, 5.1e9),
    "repvgg_b0": _row(_B, 1, 2.5, 14.33e6, 3.1e9),
    "repvgg_b1": _row(_B, 2, 4, 51.82e6, 11.8e9),
    "repvgg_b1g4": _row(_B, 2, 4, 36.12e6, 7.3e9, groups=4),
    "repvgg_b2": _row(_B, 2.5, 5, 80.31e6, 18.4e9),
    "repvgg_b2g4": _row(_B, 2.5, 5, 55.77e6, 11.3e9, groups=4),
    "repvgg_b3": _row(_B, 3, 5, 110.96e6, 26.2e9),
    "repvgg_b3g4": _row(_B, 3, 5, 75.62e6, 16.1e9, groups=4),
    # The figures of the one network with gates are those of the form that trains.
    "repvgg_d2se": Variant(
        RepVGG,
        RepVGGConfig((8, 14, 24, 1), (160, 320, 640, 2560), 64, se_ratio=1 / 16),
        133.33e6,
        36.56e9,
        source="the authors' model page (DingXiaoH/RepVGG)",
    ),
    "repvgg_test": Variant(
        RepVGG, RepVGGConfig((1, 2), (16, 24), 8, groups=2, se_ratio=0.25), size=32, classes=10
    ),
}
