"""Poincare ResNet: a residual network whose maps are points of a hyperbolic space throughout.

Paper: van Spengler et al., https://arxiv.org/abs/2303.14027. Depths are 6 n + 2, and networks are named after the
channels of their three groups. All parameters are free numbers (kernels, offsets, tangents at the origin), on which
the Riemannian optimizers of the paper's experiments are the ordinary ones.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from omniconv.layers.geometry.poincare import (
    PoincareBatchNorm2d,
    PoincareConv2d,
    PoincareLinear,
    poincare_sum,
)
from omniconv.models.backbone import Backbone, Feature, FeatureInfo, Variant

__all__ = ["PoincareResNet", "PoincareResNetConfig"]


@dataclass(frozen=True)
class PoincareResNetConfig:
    """What tells one Poincare ResNet from another.

    Attributes:
        widths: channels of each group.
        depth: blocks a group, n; a network of three groups has 6 n + 2 layers.
        c: minus the curvature.
    """

    widths: tuple[int, ...] = (8, 16, 32)
    depth: int = 3
    c: float = 0.1


class PoincareBlock(nn.Module):
    r"""Two convolutions with midpoint batch norms and a shortcut by Mobius addition, :math:`f(x) \oplus x`."""

    def __init__(self, config: PoincareResNetConfig, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        c = config.c
        self.conv1 = PoincareConv2d(in_channels, channels, 3, stride=stride, c=c)
        self.bn1 = PoincareBatchNorm2d(channels, c)
        self.conv2 = PoincareConv2d(channels, channels, 3, c=c)
        self.bn2 = PoincareBatchNorm2d(channels, c)
        self.act = nn.ReLU()
        same = stride == 1 and in_channels == channels
        self.downsample = (
            nn.Identity() if same else PoincareConv2d(in_channels, channels, 1, stride=stride, c=c)
        )
        self.c = c

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y = self.act(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.act(poincare_sum(y, self.downsample(x), self.c))


class PoincareResNet(Backbone):
    """Fully hyperbolic residual network of `Poincare ResNet <https://arxiv.org/abs/2303.14027>`_.

    Images are taken as tangents at the origin; maps are handed on as such, and so are the logits.

    Args:
        config: which one.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.

    Shapes:
        - input: :math:`(N, C, H, W)`
        - output: :math:`(N, K)`
    """

    def __init__(
        self, config: PoincareResNetConfig = PoincareResNetConfig(), num_classes: int = 10, in_chans: int = 3
    ) -> None:
        super().__init__()
        self.config = config
        width = config.widths[0]
        self.conv = PoincareConv2d(in_chans, width, 3, c=config.c)
        self.bn = PoincareBatchNorm2d(width, config.c)
        self.act = nn.ReLU()
        self.groups = nn.Sequential()
        self.feature_info = FeatureInfo()
        for group, out in enumerate(config.widths):
            blocks = nn.Sequential()
            for block in range(config.depth):
                blocks.append(PoincareBlock(config, width, out, 2 if group and not block else 1))
                width = out
            self.groups.append(blocks)
            self.feature_info.append(Feature(num_chs=out, reduction=2**group, module=f"groups.{group}"))
        self.num_features = width
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new classifier for `num_classes` in place; 0 leaves none."""
        self.num_classes = num_classes
        c = self.config.c
        self.fc = PoincareLinear(self.num_features, num_classes, c) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        """Return the last hyperbolic linear layer."""
        return self.fc

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """Return every group's feature map, tangents at the origin."""
        x = self.act(self.bn(self.conv(x)))
        maps = []
        for group in self.groups:
            x = group(x)
            maps.append(x)
        return maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits of a feature map, or the pooled features if `pre_logits`."""
        x = x.mean((2, 3))
        return x if pre_logits else self.fc(x)


def _row(widths: tuple[int, ...], depth: int) -> Variant:
    return Variant(PoincareResNet, PoincareResNetConfig(widths, depth), size=32, classes=10)


VARIANTS = {
    "hyperbolic_4_8_16_resnet20": _row((4, 8, 16), 3),
    "hyperbolic_4_8_16_resnet32": _row((4, 8, 16), 5),
    "hyperbolic_8_16_32_resnet20": _row((8, 16, 32), 3),
    "hyperbolic_8_16_32_resnet32": _row((8, 16, 32), 5),
    "hyperbolic_8_16_32_resnet56": _row((8, 16, 32), 9),
    "hyperbolic_test": _row((8, 16), 1),
}
