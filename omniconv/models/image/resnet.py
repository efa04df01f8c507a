"""Residual networks: ResNet, ResNeXt, Wide ResNet, SE- and ECA-ResNet, and their CIFAR forms.

Papers: He et al., https://arxiv.org/abs/1512.03385; ResNeXt, Xie et al., https://arxiv.org/abs/1611.05431;
Wide ResNet, Zagoruyko and Komodakis, https://arxiv.org/abs/1605.07146; the deep stems and average-pooled
shortcuts ("c", "d", "s", "t"), He et al., https://arxiv.org/abs/1812.01187.

They differ by configuration alone: ResNeXt splits the 3x3 convolution into `cardinality` groups, Wide ResNet
raises `base_width`, SE and ECA put a gate before the addition. Parameter names are those of the public weights.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.layers.attention.eca import EfficientChannelAttention
from omniconv.layers.attention.se import SqueezeExcite
from omniconv.layers.drop_path import DropPath
from omniconv.models.backbone import Backbone, Feature, FeatureInfo, Variant
from omniconv.models.weights import Rules

__all__ = ["BasicBlock", "Bottleneck", "ResNet", "ResNetConfig"]


@dataclass(frozen=True)
class ResNetConfig:
    """What tells one residual network from another.

    Attributes:
        depths: blocks a stage.
        widths: base width of each stage; a bottleneck puts out four times as many channels.
        bottleneck: 1x1, 3x3, 1x1 blocks instead of two 3x3.
        cardinality: groups of the bottleneck's 3x3 convolution (ResNeXt).
        base_width: channels of one group when the stage's width is 64.
        stem: "7x7" (stride 2, then max pooling), "deep" (three 3x3), "tiered" (deep with rising widths), or
            "3x3" (stride 1 and no pooling, for images of about 32 pixels).
        stem_width: width of the deep stems' first convolutions.
        shortcut: where shapes change, a strided 1x1 convolution ("conv"), average pooling before a 1x1
            convolution ("pool"), or every other pixel with zero channels added ("pad", without parameters).
        shortcut_kernel: kernel of the "conv" shortcut from the second stage on.
        reduce_first: divides the width of the bottleneck's first convolution (SENet-154).
        gate: "se" or "eca" before the addition.
        gate_kernels: ECA's kernel size of each stage; the paper's formula if empty.
        norm: "batch" or "group" (32 groups).
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0 at the first.
    """

    depths: tuple[int, ...] = (3, 4, 6, 3)
    widths: tuple[int, ...] = (64, 128, 256, 512)
    bottleneck: bool = True
    cardinality: int = 1
    base_width: int = 64
    stem: Literal["7x7", "deep", "tiered", "3x3"] = "7x7"
    stem_width: int = 32
    shortcut: Literal["conv", "pool", "pad"] = "conv"
    shortcut_kernel: int = 1
    reduce_first: int = 1
    gate: Literal["se", "eca"] | None = None
    gate_kernels: tuple[int, ...] = ()
    norm: Literal["batch", "group"] = "batch"
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.widths):
            raise ValueError(f"depths and widths must be equally long: got {self.depths} and {self.widths}")
        if self.gate_kernels and (self.gate != "eca" or len(self.gate_kernels) != len(self.depths)):
            raise ValueError(f"gate_kernels needs gate='eca' and one size a stage: got {self.gate_kernels}")

    def make_norm(self, channels: int) -> nn.Module:
        """Return the norm over `channels`."""
        return nn.BatchNorm2d(channels) if self.norm == "batch" else nn.GroupNorm(32, channels)

    def make_gate(self, channels: int, stage: int) -> nn.Module:
        """Return the gate of a block of `stage` that puts out `channels`."""
        if self.gate == "se":
            return SqueezeExcite(channels)
        if self.gate == "eca":
            kernel = self.gate_kernels[stage] if self.gate_kernels else None
            return EfficientChannelAttention(channels, kernel)
        return nn.Identity()


class PadShortcut(nn.Module):
    """Option A of the ResNet paper: every `stride`-th pixel, with zero channels on both sides."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.extra, self.stride = out_channels - in_channels, stride

    def forward(self, x: Tensor) -> Tensor:
        """Subsample `x` and pad its channels."""
        before = self.extra // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.extra - before))


def make_shortcut(
    config: ResNetConfig, in_channels: int, out_channels: int, stride: int, stage: int
) -> nn.Module:
    """Return the shortcut between two shapes; its state-dict names are those of the public weights."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    if config.shortcut == "pad":
        return PadShortcut(in_channels, out_channels, stride)
    norm = config.make_norm(out_channels)
    if config.shortcut == "pool":
        pool = (
            nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False) if stride > 1 else nn.Identity()
        )
        return nn.Sequential(pool, nn.Conv2d(in_channels, out_channels, 1, bias=False), norm)
    kernel = config.shortcut_kernel if stage > 0 else 1
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, (kernel - 1) // 2, bias=False)
    return nn.Sequential(conv, norm)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: y = relu(shortcut(x) + gate(f(x)))."""

    expansion = 1

    def __init__(
        self, config: ResNetConfig, in_channels: int, width: int, stride: int, stage: int, drop: float
    ) -> None:
        super().__init__()
        inner = width // config.reduce_first
        self.conv1 = nn.Conv2d(in_channels, inner, 3, stride, 1, bias=False)
        self.bn1 = config.make_norm(inner)
        self.conv2 = nn.Conv2d(inner, width, 3, 1, 1, bias=False)
        self.bn2 = config.make_norm(width)
        self.se = config.make_gate(width, stage)
        self.downsample = make_shortcut(config, in_channels, width, stride, stage)
        self.drop_path = DropPath(drop)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y = self.act(self.bn1(self.conv1(x)))
        y = self.se(self.bn2(self.conv2(y)))
        return self.act(self.downsample(x) + self.drop_path(y))


class Bottleneck(nn.Module):
    """1x1 reduce, 3x3 (in `cardinality` groups), 1x1 expand, and a shortcut; the 3x3 carries the stride.

    The grouped convolution is ResNeXt's sum over C paths of the same small transform, written as one.
    """

    expansion = 4

    def __init__(
        self, config: ResNetConfig, in_channels: int, width: int, stride: int, stage: int, drop: float
    ) -> None:
        super().__init__()
        inner = width * config.base_width // 64 * config.cardinality
        first = inner // config.reduce_first
        out = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, first, 1, bias=False)
        self.bn1 = config.make_norm(first)
        self.conv2 = nn.Conv2d(first, inner, 3, stride, 1, groups=config.cardinality, bias=False)
        self.bn2 = config.make_norm(inner)
        self.conv3 = nn.Conv2d(inner, out, 1, bias=False)
        self.bn3 = config.make_norm(out)
        self.se = config.make_gate(out, stage)
        self.downsample = make_shortcut(config, in_channels, out, stride, stage)
        self.drop_path = DropPath(drop)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y = self.act(self.bn1(self.conv1(x)))
        y = self.act(self.bn2(self.conv2(y)))
        y = self.se(self.bn3(self.conv3(y)))
        return self.act(self.downsample(x) + self.drop_path(y))


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
        small = config.stem == "3x3"
        channels = config.widths[0] if small else 64
        if config.stem in ("deep", "tiered"):
            width = config.stem_width
            first, second = (width * 3 // 4, width) if config.stem == "tiered" else (width, width)
            channels = 2 * width
            self.conv1 = nn.Sequential(
                nn.Conv2d(in_chans, first, 3, 2, 1, bias=False),
                config.make_norm(first),
                nn.ReLU(inplace=True),
                nn.Conv2d(first, second, 3, 1, 1, bias=False),
                config.make_norm(second),
                nn.ReLU(inplace=True),
                nn.Conv2d(second, channels, 3, 1, 1, bias=False),
            )
        elif small:
            self.conv1 = nn.Conv2d(in_chans, channels, 3, 1, 1, bias=False)
        else:
            self.conv1 = nn.Conv2d(in_chans, channels, 7, 2, 3, bias=False)
        self.bn1 = config.make_norm(channels)
        self.act1 = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)

        block = Bottleneck if config.bottleneck else BasicBlock
        reduction = 1 if small else 4
        self.feature_info = FeatureInfo(
            [Feature(num_chs=channels, reduction=1 if small else 2, module="act1")]
        )
        drops = torch.linspace(0, config.drop_path_rate, sum(config.depths), device="cpu").tolist()
        self.stage_names = [f"layer{stage + 1}" for stage in range(len(config.depths))]
        for stage, (name, depth, width) in enumerate(
            zip(self.stage_names, config.depths, config.widths, strict=True)
        ):
            blocks = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(block(config, channels, width, stride, stage, drops.pop(0)))
                channels = width * block.expansion
            reduction *= 1 if stage == 0 else 2
            self.add_module(name, nn.Sequential(*blocks))
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
            if isinstance(module, BasicBlock | Bottleneck):
                last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
                nn.init.zeros_(last.get_parameter("weight"))

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
        for name in self.stage_names:
            x = self.get_submodule(name)(x)
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
    "resnext_test": _small(
        ResNetConfig((1, 1), (16, 32), stem="deep", stem_width=8, cardinality=4, base_width=16, gate="se")
    ),
}  # fmt: skip

OFFICIAL_NAMES: Rules = ((r"^linear\.", "fc."),)
"""The widespread CIFAR ResNet weights (option A) call the classifier `linear`; all other names agree."""
