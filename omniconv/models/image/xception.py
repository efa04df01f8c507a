"""Xception: every convolution but the first two is depthwise separable, with a shortcut around every two or three.

Paper: Chollet, https://arxiv.org/abs/1610.02357, figure 5. Parameter names are those of the public weights.
"""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

from omniconv.layers.conv.separable import SeparableConv2d
from omniconv.models.backbone import Backbone, Feature, FeatureInfo, Variant

__all__ = ["Xception", "XceptionConfig", "XceptionModule"]

_ACTS: dict[str, type[nn.Module] | None] = {"none": None, "relu": nn.ReLU, "elu": nn.ELU}


@dataclass(frozen=True)
class XceptionConfig:
    """What tells one Xception from another.

    Attributes:
        stem: channels of the two first convolutions; the first one has stride 2.
        entry: channels of the modules that halve the map.
        middle: number of modules, of three separable convolutions each, that keep it.
        exit: channels of the last module that halves it, and of the two last separable convolutions.
        act: activation between the depthwise and pointwise convolutions; the paper finds none best.
        drop_rate: dropout before the classifier.
    """

    stem: tuple[int, int] = (32, 64)
    entry: tuple[int, ...] = (128, 256, 728)
    middle: int = 8
    exit: tuple[int, int, int] = (1024, 1536, 2048)
    act: Literal["none", "relu", "elu"] = "none"
    drop_rate: float = 0.5

    def __post_init__(self) -> None:
        if self.act not in _ACTS:
            raise ValueError(f"act must be one of {sorted(_ACTS)}: got {self.act!r}")

    def make_conv(self, in_channels: int, out_channels: int) -> SeparableConv2d:
        """Return a separable convolution of 3x3 pixels."""
        names = ("conv1", "pointwise")
        return SeparableConv2d(in_channels, out_channels, act=_ACTS[self.act], names=names)


class XceptionModule(nn.Module):
    """ReLU, separable convolution and norm, two or three times, and a shortcut around them.

    Args:
        config: for the convolutions.
        channels: of the input and after every convolution.
        stride: 2 pools the result, and gives the shortcut a strided 1x1 convolution.
        first_relu: begin with a ReLU.
    """

    def __init__(
        self, config: XceptionConfig, channels: tuple[int, ...], stride: int, first_relu: bool = True
    ) -> None:
        super().__init__()
        first, last = channels[0], channels[-1]
        self.skip: nn.Module = nn.Identity()
        self.skipbn: nn.Module = nn.Identity()
        if stride > 1 or first != last:
            self.skip = nn.Conv2d(first, last, 1, stride, bias=False)
            self.skipbn = nn.BatchNorm2d(last)
        layers: list[nn.Module] = []
        for index, (before, after) in enumerate(pairwise(channels)):
            if index > 0 or first_relu:
                # The shortcut still needs what enters the first one.
                layers.append(nn.ReLU(inplace=index > 0))
            layers += [config.make_conv(before, after), nn.BatchNorm2d(after)]
        if stride > 1:
            layers.append(nn.MaxPool2d(3, stride, 1))
        self.rep = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Return the module's output."""
        return self.rep(x) + self.skipbn(self.skip(x))


class Xception(Backbone):
    """Network of `Xception <https://arxiv.org/abs/1610.02357>`_.

    Args:
        config: which one.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.

    Shapes:
        - input: :math:`(N, C, H, W)`, of at least 7 pixels a side
        - output: :math:`(N, K)`
    """

    def __init__(
        self, config: XceptionConfig = XceptionConfig(), num_classes: int = 1000, in_chans: int = 3
    ) -> None:
        super().__init__()
        self.config = config
        first, channels = config.stem
        self.conv1 = nn.Conv2d(in_chans, first, 3, 2, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(first, channels, 3, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act2 = nn.ReLU(inplace=True)

        make = partial(XceptionModule, config)
        modules = []
        for width in config.entry:
            modules.append(make((channels, width, width), 2, first_relu=bool(modules)))
            channels = width
        modules += [make((channels,) * 4, 1) for _ in range(config.middle)]
        width, third, last = config.exit
        modules.append(make((channels, channels, width), 2))
        self.block_names = [f"block{number}" for number in range(1, len(modules) + 1)]
        for name, module in zip(self.block_names, modules, strict=True):
            self.add_module(name, module)

        self.conv3 = config.make_conv(width, third)
        self.bn3 = nn.BatchNorm2d(third)
        self.act3 = nn.ReLU(inplace=True)
        self.conv4 = config.make_conv(third, last)
        self.bn4 = nn.BatchNorm2d(last)
        self.act4 = nn.ReLU(inplace=True)

        # A map is what the ReLU before the next halving gives; the first halving is the stem's.
        halvings = [*self.block_names[1 : len(config.entry)], self.block_names[-1]]
        self.feature_info = FeatureInfo([Feature(num_chs=config.stem[1], reduction=2, module="act2")])
        for stage, (name, count) in enumerate(zip(halvings, config.entry, strict=True)):
            self.feature_info.append(Feature(num_chs=count, reduction=4 * 2**stage, module=f"{name}.rep.0"))
        reduction = 4 * 2 ** len(config.entry)
        self.feature_info.append(Feature(num_chs=last, reduction=reduction, module="act4"))

        self.num_features = last
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(config.drop_rate)
        self.reset_classifier(num_classes)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw convolutions as in He et al."""
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
        """Return the last map of every resolution, after its ReLU."""
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.act2(self.bn2(self.conv2(x)))
        maps = [x]
        wanted = {feature["module"] for feature in self.feature_info}
        for name in self.block_names:
            block = self.get_submodule(name)
            if f"{name}.rep.0" in wanted:
                maps.append(block.get_submodule("rep.0")(x))
            x = block(x)
        x = self.act3(self.bn3(self.conv3(x)))
        maps.append(self.act4(self.bn4(self.conv4(x))))
        return maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits of a feature map, or the pooled features if `pre_logits`."""
        x = self.drop(self.global_pool(x).flatten(1))
        return x if pre_logits else self.fc(x)


VARIANTS = {
    "legacy_xception": Variant(Xception, XceptionConfig(), 22_855_952, 8.4e9, 299, source="Keras"),
    "xception_test": Variant(
        Xception,
        XceptionConfig((8, 12), (16, 24), 1, (28, 32, 36), act="relu"),
        size=32, classes=10,
    ),
}  # fmt: skip
