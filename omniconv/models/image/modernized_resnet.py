"""From ResNet-50 to ConvNeXt-T, one switch at a time.

Paper: Liu et al., A ConvNet for the 2020s, https://arxiv.org/abs/2201.03545, section 2 and table 10. Every row
of `VARIANTS` is a step of the paper with its published multiply-adds; the last one is ConvNeXt-T without layer
scale.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from omniconv.layers.drop_path import DropPath
from omniconv.layers.norm.layer_norm2d import LayerNorm2d
from omniconv.models.backbone import Backbone, Feature, FeatureInfo, Variant

__all__ = ["ModernizedBlock", "ModernizedResNet", "ModernizedResNetConfig"]


@dataclass(frozen=True)
class ModernizedResNetConfig:
    """A point on the way; the defaults are ResNet-50.

    Attributes:
        depths: blocks a stage.
        widths: width of each stage: of the bottleneck, which puts out four times as much, or, if `inverted`,
            of the block's ends, between which it is four times as wide.
        patchify: a 4x4 convolution of stride 4 as stem instead of 7x7, stride 2 and max pooling.
        depthwise: make the spatial convolution depthwise.
        inverted: wide in the middle instead of at the ends; needs `depthwise`.
        depthwise_first: move the depthwise convolution up, before the expansion; needs `inverted`.
        kernel_size: of the spatial convolution, odd.
        act: "relu" or "gelu".
        few_acts: one activation a block, between the pointwise layers; needs `depthwise_first`.
        few_norms: one norm a block, before the pointwise layers; needs `depthwise_first`.
        norm: "batch" or "layer".
        separate_downsampling: norm and 2x2 convolution of stride 2 between the stages, instead of a stride in
            each stage's first block, and a norm after the pooling.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0 at the first.
    """

    depths: tuple[int, ...] = (3, 4, 6, 3)
    widths: tuple[int, ...] = (64, 128, 256, 512)
    patchify: bool = False
    depthwise: bool = False
    inverted: bool = False
    depthwise_first: bool = False
    kernel_size: int = 3
    act: Literal["relu", "gelu"] = "relu"
    few_acts: bool = False
    few_norms: bool = False
    norm: Literal["batch", "layer"] = "batch"
    separate_downsampling: bool = False
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.widths):
            raise ValueError(f"depths and widths must be equally long: got {self.depths} and {self.widths}")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive: got {self.kernel_size}")
        if self.inverted and not self.depthwise:
            raise ValueError("inverted needs depthwise")
        if self.depthwise_first and not self.inverted:
            raise ValueError("depthwise_first needs inverted")
        if (self.few_acts or self.few_norms) and not self.depthwise_first:
            raise ValueError("few_acts and few_norms need depthwise_first")

    def make_norm(self, channels: int) -> nn.Module:
        """Return the norm over `channels`."""
        return nn.BatchNorm2d(channels) if self.norm == "batch" else LayerNorm2d(channels)

    def make_act(self) -> nn.Module:
        """Return the activation."""
        return nn.ReLU() if self.act == "relu" else nn.GELU()

    def out_channels(self, stage: int) -> int:
        """Return the channels of a stage's map."""
        return self.widths[stage] * (1 if self.inverted else 4)


class ModernizedBlock(nn.Module):
    """Spatial and pointwise convolutions in the order, with the norms and activations that `config` says."""

    def __init__(
        self, config: ModernizedResNetConfig, in_channels: int, stage: int, stride: int, drop: float
    ) -> None:
        super().__init__()
        width, out = config.widths[stage], config.out_channels(stage)
        wide = 4 * width if config.inverted else width
        spatial = in_channels if config.depthwise_first else wide
        kernel, groups = config.kernel_size, spatial if config.depthwise else 1
        bias = config.few_norms  # superfluous where a norm follows every convolution
        conv = nn.Conv2d(spatial, spatial, kernel, stride, kernel // 2, groups=groups, bias=bias)
        first = spatial if config.depthwise_first else in_channels
        convs = [nn.Conv2d(first, wide, 1, bias=bias), nn.Conv2d(wide, out, 1, bias=bias)]
        convs.insert(0 if config.depthwise_first else 1, conv)
        layers: list[nn.Module] = []
        for index, layer in enumerate(convs):
            layers.append(layer)
            if index == 0 or not config.few_norms:
                layers.append(config.make_norm(layer.out_channels))
            if index == 1 or (index == 0 and not config.few_acts):
                layers.append(config.make_act())
        self.branch = nn.Sequential(*layers)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out, 1, stride, bias=False), config.make_norm(out)
            )
        self.drop_path = DropPath(drop)
        self.act = nn.Identity() if config.few_acts else config.make_act()

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        return self.act(self.shortcut(x) + self.drop_path(self.branch(x)))


class ModernizedResNet(Backbone):
    """The network between ResNet-50 and ConvNeXt-T of `A ConvNet for the 2020s <https://arxiv.org/abs/2201.03545>`_.

    Args:
        config: which step.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.

    Shapes:
        - input: :math:`(N, C, H, W)`
        - output: :math:`(N, K)`
    """

    def __init__(self, config: ModernizedResNetConfig, num_classes: int = 1000, in_chans: int = 3) -> None:
        super().__init__()
        self.config = config
        channels = config.widths[0]
        if config.patchify:
            stem: list[nn.Module] = [nn.Conv2d(in_chans, channels, 4, 4), config.make_norm(channels)]
        else:
            stem = [nn.Conv2d(in_chans, channels, 7, 2, 3, bias=False), config.make_norm(channels)]
        if not config.few_acts:
            stem.append(config.make_act())
        if not config.patchify:
            stem.append(nn.MaxPool2d(3, 2, 1))
        self.stem = nn.Sequential(*stem)

        drops = torch.linspace(0, config.drop_path_rate, sum(config.depths), device="cpu").tolist()
        self.feature_info = FeatureInfo()
        self.stages = nn.ModuleList()
        for stage, depth in enumerate(config.depths):
            layers: list[nn.Module] = []
            out = config.out_channels(stage)
            if stage > 0 and config.separate_downsampling:
                layers += [config.make_norm(channels), nn.Conv2d(channels, out, 2, 2)]
                channels = out
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 and not config.separate_downsampling else 1
                layers.append(ModernizedBlock(config, channels, stage, stride, drops.pop(0)))
                channels = out
            self.stages.append(nn.Sequential(*layers))
            self.feature_info.append(
                Feature(num_chs=channels, reduction=4 * 2**stage, module=f"stages.{stage}")
            )

        self.num_features = channels
        self.norm = LayerNorm2d(channels) if config.separate_downsampling else nn.Identity()
        self.drop = nn.Dropout(config.drop_rate)
        self.reset_classifier(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new classifier for `num_classes` in place; 0 leaves none."""
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.fc

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """Return every stage's feature map."""
        x = self.stem(x)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits of a feature map, or what enters the classifier if `pre_logits`."""
        x = self.drop(self.norm(x.mean((2, 3), keepdim=True)).flatten(1))
        return x if pre_logits else self.fc(x)


_resnet = ModernizedResNetConfig()
_ratio = replace(_resnet, depths=(3, 3, 9, 3))
_patchify = replace(_ratio, patchify=True)
_depthwise = replace(_patchify, depthwise=True)
_width = replace(_depthwise, widths=(96, 192, 384, 768))
_inverted = replace(_width, inverted=True)
_moved_up = replace(_inverted, depthwise_first=True)
_kernel = replace(_moved_up, kernel_size=7)
_gelu = replace(_kernel, act="gelu")
_few_acts = replace(_gelu, few_acts=True)
_few_norms = replace(_few_acts, few_norms=True)
_layer_norm = replace(_few_norms, norm="layer")
_downsampling = replace(_layer_norm, separate_downsampling=True)


def _row(config: ModernizedResNetConfig, macs: float | None) -> Variant:
    return Variant(ModernizedResNet, config, macs=macs)


VARIANTS = {
    "modernized_resnet50": _row(_resnet, 4.09e9),
    "modernized_resnet50_stage_ratio": _row(_ratio, 4.53e9),
    "modernized_resnet50_patchify": _row(_patchify, 4.42e9),
    "modernized_resnet50_depthwise": _row(_depthwise, 2.35e9),
    "modernized_resnet50_width": _row(_width, 5.27e9),
    "modernized_resnet50_inverted": _row(_inverted, 4.64e9),
    "modernized_resnet50_depthwise_first": _row(_moved_up, 4.07e9),
    "modernized_resnet50_kernel5": _row(replace(_moved_up, kernel_size=5), 4.10e9),
    "modernized_resnet50_kernel7": _row(_kernel, 4.15e9),
    "modernized_resnet50_kernel9": _row(replace(_moved_up, kernel_size=9), 4.21e9),
    "modernized_resnet50_kernel11": _row(replace(_moved_up, kernel_size=11), 4.29e9),
    "modernized_resnet50_gelu": _row(_gelu, 4.15e9),
    "modernized_resnet50_few_acts": _row(_few_acts, 4.15e9),
    "modernized_resnet50_few_norms": _row(_few_norms, 4.15e9),
    # Table 10 prints 4.46 G here, which is what the next step costs: a norm has no multiply-adds of its own,
    # and table 11 (ResNet-200) has the same figure before and after this step.
    "modernized_resnet50_layer_norm": _row(_layer_norm, None),
    "modernized_resnet50_downsampling": _row(_downsampling, 4.49e9),
    "modernized_resnet_test": Variant(
        ModernizedResNet,
        ModernizedResNetConfig(
            (1, 2), (8, 12), patchify=True, depthwise=True, inverted=True, depthwise_first=True, kernel_size=5
        ),
        size=32,
    ),
}  # fmt: skip
