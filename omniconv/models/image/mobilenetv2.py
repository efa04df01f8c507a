"""MobileNetV2: a network of inverted residuals with linear bottlenecks.

Paper: Sandler et al., https://arxiv.org/abs/1801.04381. EfficientNet (`omniconv.models.image.efficientnet`)
is the same network with a gate, another activation and another table of stages. Parameter names are those of
the public weights.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from omniconv.layers.conv.condconv import CondConvResidual, ExpertConv2d
from omniconv.layers.conv.inverted_residual import (
    DepthwiseSeparable,
    InvertedResidual,
    make_conv,
    round_channels,
)
from omniconv.models.backbone import Backbone, Feature, FeatureInfo, Variant

__all__ = ["MobileNetV2", "MobileNetV2Config", "Stage"]

_ACTS: dict[str, type[nn.Module]] = {"relu6": nn.ReLU6, "silu": nn.SiLU}


class Stage(NamedTuple):
    """One row of the papers' tables.

    Attributes:
        expansion: t; 1 leaves the expansion out.
        channels: c, put out by each block, before the width multiplier.
        repeats: n, blocks, before the depth multiplier.
        stride: s, of the first block.
        kernel_size: of the depthwise convolutions.
        experts: kernels that every convolution mixes for each sample (CondConv); 0 for ordinary convolutions.
    """

    expansion: int
    channels: int
    repeats: int
    stride: int
    kernel_size: int = 3
    experts: int = 0


@dataclass(frozen=True)
class MobileNetV2Config:
    """What tells one network of inverted residuals from another.

    Attributes:
        stages: the blocks.
        width: multiplies all channels, which are rounded to multiples of 8; the head only widens.
        depth: multiplies the repeats, which are rounded up.
        fixed_ends: leave the stem, the head and the repeats of the first and last stage as they are.
        stem_width: channels of the first convolution.
        head_width: channels of the last.
        act: activation.
        se_ratio: bottleneck of the squeeze-and-excitation gates as a share of a block's input channels; 0 for
            no gates.
        padding: "symmetric", or TensorFlow's "same", which its weights need.
        norm_eps: of the batch norms; TensorFlow's weights need 0.001.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth; rises linearly from 0 at the first block to this after the last.
    """

    stages: tuple[Stage, ...] = (
        Stage(1, 16, 1, 1),
        Stage(6, 24, 2, 2),
        Stage(6, 32, 3, 2),
        Stage(6, 64, 4, 2),
        Stage(6, 96, 3, 1),
        Stage(6, 160, 3, 2),
        Stage(6, 320, 1, 1),
    )
    width: float = 1.0
    depth: float = 1.0
    fixed_ends: bool = False
    stem_width: int = 32
    head_width: int = 1280
    act: Literal["relu6", "silu"] = "relu6"
    se_ratio: float = 0.0
    padding: Literal["symmetric", "same"] = "symmetric"
    norm_eps: float = 1e-5
    drop_rate: float = 0.2
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        # A configuration read from JSON brings its stages as lists.
        object.__setattr__(self, "stages", tuple(Stage(*stage) for stage in self.stages))
        if self.act not in _ACTS:
            raise ValueError(f"act must be one of {sorted(_ACTS)}: got {self.act!r}")
        for stage in self.stages:
            if stage.experts and stage.expansion == 1:
                raise ValueError(f"a stage with experts needs an expansion above 1: got {stage}")

    def repeats(self, index: int) -> int:
        """Return how many blocks stage `index` has."""
        fixed = self.fixed_ends and index in (0, len(self.stages) - 1)
        return self.stages[index].repeats if fixed else math.ceil(self.stages[index].repeats * self.depth)


class MobileNetV2(Backbone):
    """Mobile network of `MobileNetV2 <https://arxiv.org/abs/1801.04381>`_.

    Args:
        config: which one.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.

    Shapes:
        - input: :math:`(N, C, H, W)`
        - output: :math:`(N, K)`
    """

    def __init__(
        self, config: MobileNetV2Config = MobileNetV2Config(), num_classes: int = 1000, in_chans: int = 3
    ) -> None:
        super().__init__()
        self.config = config
        act = _ACTS[config.act]
        norm = partial(nn.BatchNorm2d, eps=config.norm_eps)
        ends = 1.0 if config.fixed_ends else config.width
        channels = round_channels(config.stem_width * ends)
        self.conv_stem = make_conv(in_chans, channels, 3, 2, padding=config.padding)
        self.bn1 = norm(channels)
        self.act1 = act(inplace=True)

        repeats = [config.repeats(index) for index in range(len(config.stages))]
        drops = torch.linspace(0, config.drop_path_rate, sum(repeats) + 1, device="cpu").tolist()
        reduction, stages = 2, []
        self.feature_info = FeatureInfo()
        if config.stages[0].stride > 1:
            self.feature_info.append(Feature(num_chs=channels, reduction=2, module="act1"))
        for index, stage in enumerate(config.stages):
            blocks = []
            for position in range(repeats[index]):
                options: dict[str, Any] = {
                    "kernel_size": stage.kernel_size,
                    "stride": stage.stride if position == 0 else 1,
                    "se_channels": int(channels * config.se_ratio),
                    "act": act,
                    "norm": norm,
                    "padding": config.padding,
                    "drop_path": drops.pop(0),
                }
                out = round_channels(stage.channels * config.width)
                if stage.expansion == 1:
                    blocks.append(DepthwiseSeparable(channels, out, **options))
                elif stage.experts:
                    options |= {"expansion": stage.expansion, "experts": stage.experts}
                    blocks.append(CondConvResidual(channels, out, **options))
                else:
                    blocks.append(InvertedResidual(channels, out, expansion=stage.expansion, **options))
                channels = out
            stages.append(nn.Sequential(*blocks))
            reduction *= stage.stride
            # A map is what the next stage halves, and the last one.
            if index + 1 == len(config.stages) or config.stages[index + 1].stride > 1:
                self.feature_info.append(
                    Feature(num_chs=channels, reduction=reduction, module=f"blocks.{index}")
                )
        self.blocks = nn.Sequential(*stages)

        self.num_features = max(config.head_width, round_channels(config.head_width * ends))
        self.conv_head = make_conv(channels, self.num_features, 1)
        self.bn2 = norm(self.num_features)
        self.act2 = act(inplace=True)
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(config.drop_rate)
        self.reset_classifier(num_classes)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw every convolution from a normal distribution of variance 2 / (fan out of one group)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | ExpertConv2d):
                fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1] // module.groups
                nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new classifier for `num_classes` in place; 0 leaves none."""
        self.num_classes = num_classes
        self.classifier = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.classifier

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """Return the last map of every resolution, before the head's convolution."""
        x = self.act1(self.bn1(self.conv_stem(x)))
        wanted = {feature["module"] for feature in self.feature_info}
        maps = [x] if "act1" in wanted else []
        for index, stage in enumerate(self.blocks):
            x = stage(x)
            if f"blocks.{index}" in wanted:
                maps.append(x)
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the map of the head's convolution, (N, num_features, H, W)."""
        return self.act2(self.bn2(self.conv_head(self.forward_stages(x)[-1])))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits of a feature map, or the pooled features if `pre_logits`."""
        x = self.drop(self.global_pool(x).flatten(1))
        return x if pre_logits else self.classifier(x)


_SLIM = "the authors' model page (tensorflow/models, slim/nets/mobilenet)"
_TIMM = "timm's model cards"


def _row(params: float, macs: float | None, source: str = "", size: int = 224, **options) -> Variant:
    return Variant(MobileNetV2, MobileNetV2Config(**options), params, macs, size=size, source=source)


VARIANTS = {
    "mobilenetv2_035": _row(1.68e6, 59e6, _SLIM, width=0.35),
    "mobilenetv2_050": _row(1.97e6, 97e6, _SLIM, width=0.5),
    "mobilenetv2_075": _row(2.64e6, 209e6, _SLIM, width=0.75),
    "mobilenetv2_100": _row(3_504_872, 300e6),
    "mobilenetv2_110d": _row(4.52e6, None, _TIMM, width=1.1, depth=1.2, fixed_ends=True),
    "mobilenetv2_120d": _row(5.83e6, None, _TIMM, width=1.2, depth=1.4, fixed_ends=True),
    "mobilenetv2_140": _row(6.06e6, 582e6, _SLIM, width=1.4),
    "mobilenetv2_test": Variant(
        MobileNetV2,
        MobileNetV2Config(
            (Stage(1, 8, 1, 1), Stage(3, 16, 2, 2), Stage(3, 24, 1, 2, 5)), stem_width=8, head_width=64
        ),
        size=32,
        classes=10,
    ),
}
