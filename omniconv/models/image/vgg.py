"""VGG: nothing but 3x3 convolutions and max pooling, and three fully connected layers.

Paper: Simonyan and Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition,
https://arxiv.org/abs/1409.1556. The `_bn` variants have batch norm after every convolution. The fully connected layers
are written as convolutions, as in section 3.2, so that images of any size work. Parameter names are those of the
public weights (timm's form).
"""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.models.backbone import Backbone, Feature, FeatureInfo, Variant

__all__ = ["VGG", "VGGConfig"]


@dataclass(frozen=True)
class VGGConfig:
    """What tells one VGG from another.

    Attributes:
        depths: convolutions of each stage.
        widths: channels of each stage.
        hidden: width of the two hidden layers.
        window: side of the map that the first of them spans, in pixels.
        norm: batch norm after every convolution.
        drop_rate: dropout after the hidden layers.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...] = (64, 128, 256, 512, 512)
    hidden: int = 4096
    window: int = 7
    norm: bool = False
    drop_rate: float = 0.5

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.widths):
            raise ValueError(f"depths and widths must be equally long: got {self.depths} and {self.widths}")


class HiddenLayers(nn.Module):
    """Two fully connected layers as convolutions; the first spans a window, to which smaller maps are enlarged."""

    def __init__(self, channels: int, hidden: int, window: int, drop_rate: float) -> None:
        super().__init__()
        self.window = window
        self.fc1 = nn.Conv2d(channels, hidden, window)
        self.act1 = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(drop_rate)
        self.fc2 = nn.Conv2d(hidden, hidden, 1)
        self.act2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of hidden units."""
        height, width = x.shape[2:]
        if height < self.window or width < self.window:
            x = F.adaptive_avg_pool2d(x, (max(height, self.window), max(width, self.window)))
        return self.act2(self.fc2(self.drop(self.act1(self.fc1(x)))))


class Head(nn.Module):
    """Average over the places that the hidden layers saw, and the classifier."""

    def __init__(self, drop_rate: float) -> None:
        super().__init__()
        self.drop = nn.Dropout(drop_rate)
        self.fc: nn.Module = nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits of hidden units, or what enters the classifier if `pre_logits`."""
        x = self.drop(x.mean((2, 3)))
        return x if pre_logits else self.fc(x)


class VGG(Backbone):
    """Network of `Very Deep Convolutional Networks <https://arxiv.org/abs/1409.1556>`_.

    Args:
        config: which one.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.

    Shapes:
        - input: :math:`(N, C, H, W)`
        - output: :math:`(N, K)`
    """

    def __init__(self, config: VGGConfig, num_classes: int = 1000, in_chans: int = 3) -> None:
        super().__init__()
        self.config = config
        self.feature_info = FeatureInfo()
        layers: list[nn.Module] = []
        channels, reduction = in_chans, 1

        def describe() -> None:
            name = f"features.{len(layers) - 1}"
            self.feature_info.append(Feature(num_chs=channels, reduction=reduction, module=name))

        for depth, width in zip(config.depths, config.widths, strict=True):
            for _ in range(depth):
                layers.append(nn.Conv2d(channels, width, 3, padding=1))
                if config.norm:
                    layers.append(nn.BatchNorm2d(width))
                layers.append(nn.ReLU(inplace=True))
                channels = width
            describe()
            layers.append(nn.MaxPool2d(2))
            reduction *= 2
        describe()
        self.features = nn.Sequential(*layers)
        self.num_features = channels
        self.pre_logits = HiddenLayers(channels, config.hidden, config.window, config.drop_rate)
        self.head = Head(config.drop_rate)
        self.reset_classifier(num_classes)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw convolutions as in He et al.; the paper had to start from a trained shallow network."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new classifier for `num_classes` in place; 0 leaves none."""
        self.num_classes = num_classes
        self.head.fc = nn.Identity()
        if num_classes:
            self.head.fc = nn.Linear(self.config.hidden, num_classes)
            nn.init.normal_(self.head.fc.weight, std=0.01)
            nn.init.zeros_(self.head.fc.bias)

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.head.fc

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """Return the map before every pooling, and the last one."""
        wanted = {feature["module"] for feature in self.feature_info}
        maps = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if f"features.{index}" in wanted:
                maps.append(x)
        return maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits of a feature map, or the hidden units if `pre_logits`."""
        return self.head(self.pre_logits(x), pre_logits)


_A, _B, _D, _E = (1, 1, 2, 2, 2), (2, 2, 2, 2, 2), (2, 2, 3, 3, 3), (2, 2, 4, 4, 4)


def _row(depths: tuple[int, ...], params: float, macs: float, norm: bool = False) -> Variant:
    return Variant(VGG, VGGConfig(depths, norm=norm), params, macs, source="torchvision")


VARIANTS = {
    "vgg11": _row(_A, 132_863_336, 7.61e9),
    "vgg11_bn": _row(_A, 132_868_840, 7.61e9, norm=True),
    "vgg13": _row(_B, 133_047_848, 11.31e9),
    "vgg13_bn": _row(_B, 133_053_736, 11.31e9, norm=True),
    "vgg16": _row(_D, 138_357_544, 15.47e9),
    "vgg16_bn": _row(_D, 138_365_992, 15.47e9, norm=True),
    "vgg19": _row(_E, 143_667_240, 19.63e9),
    "vgg19_bn": _row(_E, 143_678_248, 19.63e9, norm=True),
    "vgg_test": Variant(VGG, VGGConfig((1, 2), (8, 12), hidden=16, window=3, norm=True), size=32, classes=10),
}
