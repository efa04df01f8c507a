"""Residual networks: ResNet, ResNeXt, Wide ResNet, SE-, ECA- and IBN-ResNet, anti-aliased and CIFAR forms.

Papers: He et al., https://arxiv.org/abs/1512.03385; ResNeXt, Xie et al., https://arxiv.org/abs/1611.05431;
Wide ResNet, Zagoruyko and Komodakis, https://arxiv.org/abs/1605.07146; the deep stems and average-pooled
shortcuts ("c", "d", "s", "t"), He et al., https://arxiv.org/abs/1812.01187.

They differ by configuration alone: ResNeXt splits the 3x3 convolution into `cardinality` groups, Wide ResNet
raises `base_width`, SE and ECA put a gate before the addition. The parts, and the papers that they are from, are in
`resnet_blocks`; a new gate, norm or stem is a line in one of its tables. Parameter names are those of the public
weights.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from omniconv.models.backbone import Backbone, Feature, FeatureInfo, Variant
from omniconv.models.image.resnet_blocks import (
    STEMS,
    BasicBlock,
    Bottleneck,
    RecallingStage,
    ResidualBlock,
    ResNetConfig,
    make_stem_pool,
)
from omniconv.models.weights import Rules

__all__ = ["BasicBlock", "Bottleneck", "ResNet", "ResNetConfig"]


class ResNet(Backbone):
    """Residual network of `Deep Residual Learning <https://arxiv.org/abs/1512.03385>`_ and its relatives.

    Args:
        config: which one.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.

    Shapes:
        - input: :math:`(N, C, H, W)`
        - output: :math:`(N, K)`
    """

    def __init__(self, config: ResNetConfig, num_classes: int = 1000, in_chans: int = 3) -> None:
        super().__init__()
        self.config = config
        self.conv1, channels = STEMS[config.stem](config, in_chans)
        self.bn1 = (
            nn.GroupNorm(channels, channels) if config.ibn == "b" else config.make_norm(channels, act=True)
        )
        self.act1 = config.make_act()
        self.maxpool = make_stem_pool(config, channels)

        small = config.stem == "3x3"
        self.feature_info = FeatureInfo(
            [Feature(num_chs=channels, reduction=1 if small else 2, module="act1")]
        )
        reduction = 1 if small else 4
        drops = torch.linspace(0, config.drop_path_rate, sum(config.depths), device="cpu").tolist()
        self.stage_names = [f"layer{stage + 1}" for stage in range(len(config.depths))]
        for stage, (name, depth, width) in enumerate(
            zip(self.stage_names, config.depths, config.widths, strict=True)
        ):
            blocks = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(config.block(config, channels, width, stride, stage, drops.pop(0), index))
                channels = width * config.block.expansion
            reduction *= 1 if stage == 0 else 2
            self.add_module(
                name, RecallingStage(*blocks) if config.gate == "pkcam" else nn.Sequential(*blocks)
            )
            self.feature_info.append(Feature(num_chs=channels, reduction=reduction, module=name))

        self.num_features = channels
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(config.drop_rate)
        self.reset_classifier(num_classes)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw convolutions as in He et al., and start every residual branch at zero."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                nn.init.zeros_(module.get_parameter(f"{module.last_norm}.weight"))

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new classifier for `num_classes` in place; 0 leaves none."""
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.fc

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """Return the stem's and every stage's feature map."""
        maps = [self.act1(self.bn1(self.conv1(x)))]
        x = self.maxpool(maps[0])
        memory = [x.mean((2, 3))] if self.config.gate == "pkcam" else None
        for name in self.stage_names:
            stage = self.get_submodule(name)
            x = stage(x) if memory is None else stage(x, memory)
            maps.append(x)
        return maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits of a feature map, or the pooled features if `pre_logits`."""
        x = self.drop(self.global_pool(x).flatten(1))
        return x if pre_logits else self.fc(x)


_D18, _D34, _D101, _D152, _D200, _D269 = (
    (2, 2, 2, 2), (3, 4, 6, 3), (3, 4, 23, 3), (3, 8, 36, 3), (3, 24, 36, 3), (3, 30, 48, 8)
)  # fmt: skip
_basic = partial(ResNetConfig, bottleneck=False)
_c = partial(ResNetConfig, stem="deep")
_d = partial(ResNetConfig, stem="deep", shortcut="pool")
_t = partial(ResNetConfig, stem="tiered", shortcut="pool")
_cifar = partial(ResNetConfig, stem="3x3", widths=(16, 32, 64), bottleneck=False, shortcut="pad")
_pooled = partial(ResNetConfig, stem="3x3", bottleneck=False, shortcut="pool")
_x32: dict[str, Any] = {"cardinality": 32, "base_width": 4}
_x32x8: dict[str, Any] = {"cardinality": 32, "base_width": 8}
_aa = partial(_d, anti_alias="average")


def _row(config: ResNetConfig, params: float | None = None, macs: float | None = None, **more) -> Variant:
    return Variant(ResNet, config, params, macs, **more)


def _small(config: ResNetConfig, params: float | None = None, macs: float | None = None) -> Variant:
    return Variant(ResNet, config, params, macs, size=32, classes=10)


_TIMM = "timm's model cards"

VARIANTS = {
    "resnet10t": _row(_t((1, 1, 1, 1), bottleneck=False), 5.44e6, 1.1e9, source=_TIMM),
    "resnet14t": _row(_t((1, 1, 1, 1)), 10.1e6, 1.7e9, source=_TIMM),
    "resnet18": _row(_basic(_D18), 11_689_512, 1.82e9),
    "resnet18d": _row(_d(_D18, bottleneck=False), 11.7e6, 2.06e9, source=_TIMM),
    "resnet26": _row(ResNetConfig(_D18), 16.0e6, 2.36e9, source=_TIMM),
    "resnet26d": _row(_d(_D18), 16.0e6, 2.6e9, source=_TIMM),
    "resnet26t": _row(_t(_D18), 16.0e6),
    "resnet34": _row(_basic(_D34), 21_797_672, 3.67e9),
    "resnet34d": _row(_d(_D34, bottleneck=False), 21.8e6, 3.9e9, source=_TIMM),
    "resnet50": _row(ResNetConfig(_D34), 25_557_032, 4.11e9),
    "resnet50c": _row(_c(_D34), 25.6e6, 4.35e9, source=_TIMM),
    "resnet50d": _row(_d(_D34), 25.6e6, 4.35e9, source=_TIMM),
    "resnet50s": _row(_c(_D34, stem_width=64), 25.7e6),
    "resnet50t": _row(_t(_D34), 25.6e6, 4.32e9, source=_TIMM),
    "resnet50_gn": _row(ResNetConfig(_D34, norm="group"), 25_557_032),
    "resnet101": _row(ResNetConfig(_D101), 44_549_160, 7.83e9),
    "resnet101c": _row(_c(_D101), 44.6e6, 8.08e9, source=_TIMM),
    "resnet101d": _row(_d(_D101), 44.6e6, 8.08e9, source=_TIMM),
    "resnet101s": _row(_c(_D101, stem_width=64), 44.7e6),
    "resnet152": _row(ResNetConfig(_D152), 60_192_808, 11.56e9),
    "resnet152c": _row(_c(_D152), 60.2e6, 11.8e9, source=_TIMM),
    "resnet152d": _row(_d(_D152), 60.2e6, 11.8e9, source=_TIMM),
    "resnet152s": _row(_c(_D152, stem_width=64), 60.3e6),
    "resnet200": _row(ResNetConfig(_D200), 64.7e6),
    "resnet200d": _row(_d(_D200), 64.7e6),
    "wide_resnet50_2": _row(ResNetConfig(_D34, base_width=128), 68_883_240, 11.43e9),
    "wide_resnet101_2": _row(ResNetConfig(_D101, base_width=128), 126_886_696, 22.8e9),
    "resnext50_32x4d": _row(ResNetConfig(_D34, **_x32), 25_028_904, 4.26e9),
    "resnext50d_32x4d": _row(_d(_D34, **_x32), 25.1e6, 4.5e9, source=_TIMM),
    "resnext101_32x4d": _row(ResNetConfig(_D101, **_x32), 44.18e6, 8.01e9),
    "resnext101_32x8d": _row(ResNetConfig(_D101, cardinality=32, base_width=8), 88_791_336, 16.48e9),
    "resnext101_32x16d": _row(ResNetConfig(_D101, cardinality=32, base_width=16), 194.03e6, 36.27e9),
    "resnext101_32x32d": _row(ResNetConfig(_D101, cardinality=32, base_width=32), 468.53e6, 87.29e9),
    "resnext101_64x4d": _row(ResNetConfig(_D101, cardinality=64, base_width=4), 83_455_272, 15.52e9),
    "seresnet18": _row(_basic(_D18, gate="se"), 11.8e6, 1.82e9, source=_TIMM),
    "seresnet34": _row(_basic(_D34, gate="se"), 22.0e6, 3.67e9, source=_TIMM),
    "seresnet50": _row(ResNetConfig(_D34, gate="se"), 28.1e6, 4.11e9),
    "seresnet50t": _row(_t(_D34, gate="se"), 28.1e6, 4.32e9, source=_TIMM),
    "seresnet101": _row(ResNetConfig(_D101, gate="se"), 49.3e6, 7.84e9, source=_TIMM),
    "seresnet152": _row(ResNetConfig(_D152, gate="se"), 66.8e6, 11.57e9, source=_TIMM),
    "seresnet152d": _row(_d(_D152, gate="se"), 66.84e6, 11.8e9, source=_TIMM),
    "seresnet200d": _row(_d(_D200, gate="se"), 71.9e6),
    "seresnet269d": _row(_d(_D269, gate="se"), 113.7e6),
    "seresnext26d_32x4d": _row(_d(_D18, gate="se", **_x32), 16.8e6, 2.73e9, source=_TIMM),
    "seresnext26t_32x4d": _row(_t(_D18, gate="se", **_x32), 16.8e6, 2.7e9, source=_TIMM),
    "seresnext50_32x4d": _row(ResNetConfig(_D34, gate="se", **_x32), 27.56e6, 4.26e9, source=_TIMM),
    "seresnext101_32x4d": _row(ResNetConfig(_D101, gate="se", **_x32), 48.96e6, 8.02e9, source=_TIMM),
    "seresnext101_32x8d": _row(
        ResNetConfig(_D101, gate="se", cardinality=32, base_width=8), 93.57e6, 16.48e9, source=_TIMM
    ),
    "seresnext101d_32x8d": _row(
        _d(_D101, gate="se", cardinality=32, base_width=8), 93.6e6, 16.72e9, source=_TIMM
    ),
    "seresnext101_64x4d": _row(
        ResNetConfig(_D101, gate="se", cardinality=64, base_width=4), 88.23e6, 15.53e9, source=_TIMM
    ),
    "senet154": _row(
        ResNetConfig(
            _D152, gate="se", cardinality=64, base_width=4, stem="deep", stem_width=64,
            shortcut_kernel=3, reduce_first=2, drop_rate=0.2,
        ),
        115.09e6, 20.77e9,
    ),
    "ecaresnet18": _row(_basic(_D18, gate="eca")),
    "ecaresnet34": _row(_basic(_D34, gate="eca")),
    "ecaresnet50": _row(ResNetConfig(_D34, gate="eca", gate_kernels=(3, 5, 5, 7)), 25_557_112),
    "ecaresnet101": _row(ResNetConfig(_D101, gate="eca", gate_kernels=(3, 5, 5, 7))),
    "ecaresnet152": _row(ResNetConfig(_D152, gate="eca", gate_kernels=(3, 5, 5, 7))),
    "ecaresnet26t": _row(_t(_D18, gate="eca"), 16.0e6),
    "ecaresnet50d": _row(_d(_D34, gate="eca"), 25.6e6, 4.35e9, source=_TIMM),
    "ecaresnet50t": _row(_t(_D34, gate="eca"), 25.6e6, 4.32e9, source=_TIMM),
    "ecaresnetlight": _row(
        ResNetConfig((1, 1, 11, 3), shortcut="pool", gate="eca"), 30.2e6, 4.11e9, source=_TIMM
    ),
    "ecaresnet101d": _row(_d(_D101, gate="eca"), 44.6e6, 8.08e9, source=_TIMM),
    "ecaresnet200d": _row(_d(_D200, gate="eca"), 64.7e6),
    "ecaresnet269d": _row(_d(_D269, gate="eca"), 102.1e6),
    "ecaresnext26t_32x4d": _row(_t(_D18, gate="eca", **_x32), 15.4e6),
    "ecaresnext50t_32x4d": _row(_t(_D34, gate="eca", **_x32), 25.1e6),
    "resnetblur18": _row(_basic(_D18, anti_alias="blur"), 11.69e6, 2.34e9, source=_TIMM),
    "resnetblur50": _row(ResNetConfig(_D34, anti_alias="blur"), 25.56e6, 5.16e9, source=_TIMM),
    "resnetblur50d": _row(_d(_D34, anti_alias="blur"), 25.6e6),
    "resnetblur101d": _row(_d(_D101, anti_alias="blur"), 44.6e6),
    "resnetaa34d": _row(_aa(_D34, bottleneck=False), 21.8e6, 4.43e9, source=_TIMM),
    "resnetaa50": _row(ResNetConfig(_D34, anti_alias="average"), 25.6e6, 5.15e9, source=_TIMM),
    "resnetaa50d": _row(_aa(_D34), 25.6e6, 5.39e9, source=_TIMM),
    "resnetaa101d": _row(_aa(_D101), 44.6e6, 9.12e9, source=_TIMM),
    "seresnetaa50d": _row(_aa(_D34, gate="se"), 28.1e6, 5.4e9, source=_TIMM),
    "seresnextaa101d_32x8d": _row(_aa(_D101, gate="se", **_x32x8), 93.6e6, 17.25e9, source=_TIMM),
    "seresnextaa201d_32x8d": _row(_aa((3, 24, 36, 4), gate="se", stem_width=64, **_x32x8), 149.4e6),
    "resnet18_ibn_a": _row(_basic(_D18, ibn="a"), 11_689_512),
    "resnet18_ibn_b": _row(_basic(_D18, ibn="b")),
    "resnet34_ibn_a": _row(_basic(_D34, ibn="a"), 21_797_672),
    "resnet34_ibn_b": _row(_basic(_D34, ibn="b")),
    "resnet50_ibn_a": _row(ResNetConfig(_D34, ibn="a"), 25_557_032),
    "resnet50_ibn_b": _row(ResNetConfig(_D34, ibn="b")),
    "resnet101_ibn_a": _row(ResNetConfig(_D101, ibn="a"), 44_549_160),
    "resnet101_ibn_b": _row(ResNetConfig(_D101, ibn="b")),
    "resnet152_ibn_a": _row(ResNetConfig(_D152, ibn="a"), 60_192_808),
    "resnet152_ibn_b": _row(ResNetConfig(_D152, ibn="b")),
    "resnext101_ibn_a": _row(ResNetConfig(_D101, ibn="a", **_x32), 44.18e6),
    "resnet20_cifar": _small(_cifar((3, 3, 3)), 0.27e6, 40.8e6),
    "resnet32_cifar": _small(_cifar((5, 5, 5)), 0.46e6, 69e6),
    "resnet44_cifar": _small(_cifar((7, 7, 7)), 0.66e6, 97e6),
    "resnet56_cifar": _small(_cifar((9, 9, 9)), 0.85e6, 125e6),
    "resnet110_cifar": _small(_cifar((18, 18, 18)), 1.73e6, 253e6),
    "resnext29_8x64d_cifar": _small(
        ResNetConfig((3, 3, 3), (64, 128, 256), stem="3x3", cardinality=8), 34.4e6
    ),
    "resnext29_16x64d_cifar": _small(
        ResNetConfig((3, 3, 3), (64, 128, 256), stem="3x3", cardinality=16), 68.1e6
    ),
    # Not from a paper: plain residual networks for pictures of 16 to 64 pixels, which `fit` chooses from.
    "resnet8_small": _small(_pooled((1, 1, 1), (16, 32, 64))),
    "resnet10_small": _small(_pooled((1, 1, 1, 1), (32, 64, 128, 256))),
    "resnet14_small": _small(_pooled((2, 2, 2), (32, 64, 128))),
    "resnet18_small": _small(_pooled((2, 2, 2, 2), (64, 128, 256, 512))),
    "resnet_test": _small(
        ResNetConfig((1, 2, 1), (8, 16, 24), bottleneck=False, stem="3x3", shortcut="pool", gate="eca")
    ),
    "resnet_pkcam_test": _small(
        _pooled((1, 1), (8, 16), gate="pkcam", norm="evonorm_b0", anti_alias="blur")
    ),
    "resnext_test": _small(
        ResNetConfig((1, 1), (16, 32), stem="deep", stem_width=8, cardinality=4, base_width=16, gate="se")
    ),
}  # fmt: skip

OFFICIAL_NAMES: Rules = ((r"^linear\.", "fc."),)
"""The widespread CIFAR ResNet weights (option A) call the classifier `linear`; all other names agree."""
