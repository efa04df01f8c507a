"""DenseNet: every layer reads the outputs of all layers of its block before it; in SparseNet, of few.

Papers: Huang et al., Densely Connected Convolutional Networks, https://arxiv.org/abs/1608.06993; Zhu et al.,
Sparsely Aggregated Convolutional Networks (SparseNet), https://arxiv.org/abs/1801.05895.

The two differ in `inputs_of`: a DenseNet's layer reads all earlier outputs, L^2 / 2 links in a block of L layers; a
SparseNet's reads those at the distances 1, 2, 4, 8, ..., which leaves L log L links and still joins any two layers by
a path of log L steps. Parameter names are those of the public weights of DenseNet.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from omniconv.models.backbone import Backbone, Feature, FeatureInfo, Variant

__all__ = ["DenseBlock", "DenseLayer", "DenseNet", "DenseNetConfig", "inputs_of"]

Aggregation = Literal["dense", "sparse"]


def inputs_of(layer: int, aggregation: Aggregation) -> list[int]:
    """Return which outputs of a block its `layer`, counted from 1, reads; output 0 is the block's input.

    "dense": all of them, oldest first. "sparse": layer - 1, layer - 2, layer - 4, ..., newest first. The orders
    are those of the public weights.
    """
    if aggregation == "dense":
        return list(range(layer))
    return [layer - 2**power for power in range(layer.bit_length())]


@dataclass(frozen=True)
class DenseNetConfig:
    """What tells one densely or sparsely connected network from another.

    Attributes:
        depths: layers of each block.
        growth_rates: channels that a layer of each block adds.
        aggregation: which earlier outputs a layer reads, as in `inputs_of`.
        merge: "concat" joins them along the channels; "sum" adds them, which needs as many channels everywhere
            in a block: the stem and the transitions then give the growth rate of the block that follows.
        bottleneck: put a 1x1 convolution to four times the growth rate before each 3x3.
        compression: share of the channels that a transition between blocks keeps.
        stem: "7x7" (stride 2, then max pooling), "deep" (three 3x3), or "3x3" (stride 1 and no pooling, for
            images of about 32 pixels).
        stem_width: channels that enter the first block; twice the growth rate if None.
        drop_rate: dropout before the classifier.
        layer_drop_rate: dropout after each layer of a block.
    """

    depths: tuple[int, ...] = (6, 12, 24, 16)
    growth_rates: tuple[int, ...] = (32, 32, 32, 32)
    aggregation: Aggregation = "dense"
    merge: Literal["concat", "sum"] = "concat"
    bottleneck: bool = True
    compression: float = 0.5
    stem: Literal["7x7", "deep", "3x3"] = "7x7"
    stem_width: int | None = None
    drop_rate: float = 0.0
    layer_drop_rate: float = 0.0

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.growth_rates):
            raise ValueError(
                f"depths and growth_rates must be equally long: got {self.depths} and {self.growth_rates}"
            )
        if self.merge == "sum" and self.stem_width not in (None, self.growth_rates[0]):
            raise ValueError(
                f"stem_width must be None or the first growth rate where merge='sum': got {self.stem_width}"
            )

    def first_channels(self) -> int:
        """Return the channels that enter the first block."""
        if self.merge == "sum":
            return self.growth_rates[0]
        return self.stem_width or 2 * self.growth_rates[0]

    def transition_channels(self, channels: int, block: int) -> int:
        """Return what the transition after `block`, which puts out `channels`, leaves of them."""
        return self.growth_rates[block + 1] if self.merge == "sum" else int(self.compression * channels)


class DenseLayer(nn.Sequential):
    """Norm, ReLU, 3x3 convolution to `growth_rate` channels; in a bottleneck after norm, ReLU, 1x1 to four times."""

    def __init__(self, in_channels: int, growth_rate: int, bottleneck: bool, drop: float) -> None:
        super().__init__()
        last = 1
        if bottleneck:
            self._append(1, nn.Conv2d(in_channels, 4 * growth_rate, 1, bias=False))
            in_channels, last = 4 * growth_rate, 2
        self._append(last, nn.Conv2d(in_channels, growth_rate, 3, padding=1, bias=False))
        if drop:
            self.add_module("drop", nn.Dropout(drop))

    def _append(self, number: int, conv: nn.Conv2d) -> None:
        self.add_module(f"norm{number}", nn.BatchNorm2d(conv.in_channels))
        self.add_module(f"relu{number}", nn.ReLU(inplace=True))
        self.add_module(f"conv{number}", conv)


class DenseBlock(nn.ModuleDict):
    r"""Layers that each read earlier outputs of the block, of `SparseNet <https://arxiv.org/abs/1801.05895>`_.

    .. math:: y_l = F_l\Bigl(\bigoplus_{j \in J(l)} y_j\Bigr), \qquad J(l) = \{0, \dots, l - 1\}
              \ \text{or}\ \{l - 1, l - 2, l - 4, l - 8, \dots\}

    where :math:`y_0` is the block's input, and the output is what a layer after the last would read.

    Args:
        config: which network.
        block: which of its blocks.
        in_channels: channels of the input.
    """

    def __init__(self, config: DenseNetConfig, block: int, in_channels: int) -> None:
        super().__init__()
        self.config = config
        growth = config.growth_rates[block]
        channels = [in_channels]
        for index in range(config.depths[block]):
            self[f"denselayer{index + 1}"] = DenseLayer(
                self._count(channels), growth, config.bottleneck, config.layer_drop_rate
            )
            channels.append(growth)
        self.out_channels = self._count(channels)

    def _count(self, channels: list[int]) -> int:
        chosen = [channels[index] for index in inputs_of(len(channels), self.config.aggregation)]
        return chosen[0] if self.config.merge == "sum" else sum(chosen)

    def _join(self, outputs: list[Tensor]) -> Tensor:
        chosen = [outputs[index] for index in inputs_of(len(outputs), self.config.aggregation)]
        if self.config.merge == "concat":
            return torch.cat(chosen, 1)
        total = chosen[0]
        for output in chosen[1:]:
            total = total + output
        return total

    def forward(self, x: Tensor) -> Tensor:
        """Return what a layer after the last would read."""
        outputs = [x]
        for layer in self.values():
            outputs.append(layer(self._join(outputs)))
        return self._join(outputs)


class DenseNet(Backbone):
    """Network of `DenseNet <https://arxiv.org/abs/1608.06993>`_ or `SparseNet <https://arxiv.org/abs/1801.05895>`_.

    Args:
        config: which one.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.

    Shapes:
        - input: :math:`(N, C, H, W)`
        - output: :math:`(N, K)`
    """

    def __init__(self, config: DenseNetConfig, num_classes: int = 1000, in_chans: int = 3) -> None:
        super().__init__()
        self.config = config
        self.feature_info = FeatureInfo()
        self.features = nn.Sequential()
        channels, reduction = config.first_channels(), 1
        if config.stem == "3x3":
            self.features.add_module("conv0", nn.Conv2d(in_chans, channels, 3, 1, 1, bias=False))
        else:
            self._add_stem(in_chans, channels)
            reduction = 4
        last = len(config.depths) - 1
        for index in range(last + 1):
            block = DenseBlock(config, index, channels)
            self.features.add_module(f"denseblock{index + 1}", block)
            channels = block.out_channels
            if index < last:
                self._describe(channels, reduction, f"denseblock{index + 1}")
                self._add_transition(index, channels, config.transition_channels(channels, index))
                channels, reduction = config.transition_channels(channels, index), 2 * reduction
        self.features.add_module("norm5", nn.BatchNorm2d(channels))
        self.features.add_module("relu5", nn.ReLU(inplace=True))
        self._describe(channels, reduction, "relu5")

        self.num_features = channels
        self.drop = nn.Dropout(config.drop_rate)
        self.reset_classifier(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def _describe(self, channels: int, reduction: int, name: str) -> None:
        self.feature_info.append(Feature(num_chs=channels, reduction=reduction, module=f"features.{name}"))

    def _add_stem(self, in_chans: int, channels: int) -> None:
        growth = self.config.growth_rates[0]
        if self.config.stem == "7x7":
            convs = [nn.Conv2d(in_chans, channels, 7, 2, 3, bias=False)]
        else:
            convs = [
                nn.Conv2d(in_chans, growth, 3, 2, 1, bias=False),
                nn.Conv2d(growth, growth, 3, 1, 1, bias=False),
                nn.Conv2d(growth, channels, 3, 1, 1, bias=False),
            ]
        for index, conv in enumerate(convs):
            self.features.add_module(f"conv{index}", conv)
            self.features.add_module(f"norm{index}", nn.BatchNorm2d(conv.out_channels))
            self.features.add_module(f"relu{index}", nn.ReLU(inplace=True))
        self._describe(channels, 2, f"relu{len(convs) - 1}")
        self.features.add_module("pool0", nn.MaxPool2d(3, 2, 1))

    def _add_transition(self, index: int, channels: int, out_channels: int) -> None:
        transition = nn.Sequential()
        transition.add_module("norm", nn.BatchNorm2d(channels))
        transition.add_module("relu", nn.ReLU(inplace=True))
        transition.add_module("conv", nn.Conv2d(channels, out_channels, 1, bias=False))
        transition.add_module("pool", nn.AvgPool2d(2, 2))
        self.features.add_module(f"transition{index + 1}", transition)

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new classifier for `num_classes` in place; 0 leaves none."""
        self.num_classes = num_classes
        self.classifier = nn.Identity()
        if num_classes:
            self.classifier = nn.Linear(self.num_features, num_classes)
            nn.init.zeros_(self.classifier.bias)

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.classifier

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """Return the feature maps of the stem, of every block but the last, and the last one normed."""
        wanted = {feature["module"] for feature in self.feature_info}
        maps = []
        for name, module in self.features.named_children():
            x = module(x)
            if f"features.{name}" in wanted:
                maps.append(x)
        return maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits of a feature map, or the pooled features if `pre_logits`."""
        x = self.drop(x.mean((2, 3)))
        return x if pre_logits else self.classifier(x)


def _imagenet(depths: tuple[int, ...], growth: int, params: float, macs: float, **more) -> Variant:
    return Variant(DenseNet, DenseNetConfig(depths, (growth,) * 4, **more), params, macs)


def cifar_config(
    depth: int, growth_rates: tuple[int, ...], *, bottleneck: bool = False, **more
) -> DenseNetConfig:
    """Return the configuration of a network of `depth` layers for pictures of 32 x 32 pixels."""
    return DenseNetConfig(
        ((depth - 4) // (6 if bottleneck else 3),) * 3,
        growth_rates,
        bottleneck=bottleneck,
        compression=0.5 if bottleneck else 1.0,
        stem="3x3",
        **more,
    )


def _cifar(depth: int, growth: int, params: float | None, **more) -> Variant:
    return Variant(DenseNet, cifar_config(depth, (growth,) * 3, **more), params, size=32, classes=10)


VARIANTS = {
    "densenet121": _imagenet((6, 12, 24, 16), 32, 7_978_856, 2.87e9),
    "densenet161": _imagenet((6, 12, 36, 24), 48, 28_681_000, 7.79e9),
    "densenet169": _imagenet((6, 12, 32, 32), 32, 14_149_480, 3.4e9),
    "densenet201": _imagenet((6, 12, 48, 32), 32, 20_013_928, 4.34e9),
    "densenet264d": _imagenet((6, 12, 64, 48), 48, 72.74e6, 13.57e9, stem="deep"),
    # Published as 1.0M: the paper's first convolution gives 16 channels where there are no bottlenecks.
    "densenet_40_12_cifar": _cifar(40, 12, 1.0e6, stem_width=16),
    "densenet_100_12_cifar": _cifar(100, 12, 7.0e6, stem_width=16),
    "densenet_100_24_cifar": _cifar(100, 24, 27.2e6, stem_width=16),
    # Published as 0.8M: one digit, coarser than the 1% to which counts are held.
    "densenet_bc_100_12_cifar": _cifar(100, 12, None, bottleneck=True),
    "densenet_bc_190_40_cifar": _cifar(190, 40, 25.6e6, bottleneck=True),
    "densenet_bc_250_24_cifar": _cifar(250, 24, 15.3e6, bottleneck=True),
    "densenet_test": Variant(DenseNet, DenseNetConfig((1, 2), (8, 8), stem="deep"), size=64),
}
