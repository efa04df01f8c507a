r"""ConvFirstNet: residual blocks that convolve in groups before they expand, to be computed as one kernel each.

Paper: Lavin, On the Efficiency of Convolutional Neural Networks, https://arxiv.org/abs/2404.03617. The inverted
residual convolves where it is widest; here the convolution stands first, where the map is narrow, so that a fused
kernel reads less around its tiles. Depths and widths are proposals, for the paper's table could not be compared.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from omniconv.layers.conv.reparam import fuse_conv_bn
from omniconv.layers.drop_path import DropPath
from omniconv.models.backbone import Variant
from omniconv.models.image.stages import Head, StageConfig, StageNetwork
from omniconv.ops.convfirst.api import BlockWeights

__all__ = ["ConvFirstBlock", "ConvFirstConfig", "ConvFirstNet"]


@dataclass(frozen=True)
class ConvFirstConfig(StageConfig):
    """What tells one ConvFirstNet from another.

    Attributes:
        group_width: channels of a group of the spatial convolutions.
        expansion: hidden channels of a block over its own.
        kernel_size: of the spatial convolutions, odd.
    """

    depths: tuple[int, ...] = (3, 3, 9, 3)
    widths: tuple[int, ...] = (64, 128, 256, 512)
    group_width: int = 8
    expansion: int = 4
    kernel_size: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(width % self.group_width for width in self.widths):
            raise ValueError(f"widths must be multiples of group_width {self.group_width}: got {self.widths}")
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd: got {self.kernel_size}")


class ConvFirstBlock(nn.Module):
    r"""Grouped convolution, expansion, ReLU and projection on a residual branch.

    .. math:: y = x + P\,\mathrm{ReLU}(E\,(G * x))

    with a batch norm behind each of G, E and P (`paper <https://arxiv.org/abs/2404.03617>`_).

    Args:
        channels: C.
        config: group width, expansion and kernel size.
        drop: stochastic depth.

    Shapes:
        - input: :math:`(N, C, H, W)`
        - output: :math:`(N, C, H, W)`
    """

    def __init__(self, channels: int, config: ConvFirstConfig, drop: float = 0.0) -> None:
        super().__init__()
        hidden, kernel = channels * config.expansion, config.kernel_size
        groups = channels // config.group_width
        self.conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=groups, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.expand = nn.Conv2d(channels, hidden, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(hidden)
        self.act = nn.ReLU()
        self.project = nn.Conv2d(hidden, channels, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(channels)
        self.drop_path = DropPath(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y = self.norm1(self.conv(x))
        y = self.act(self.norm2(self.expand(y)))
        return x + self.drop_path(self.norm3(self.project(y)))

    def folded(self) -> BlockWeights:
        """Return the weights that `omniconv.ops.convfirst` takes, the norms of eval mode folded into them."""
        conv, conv_bias = fuse_conv_bn(self.conv.weight, None, self.norm1)
        expand, expand_bias = fuse_conv_bn(self.expand.weight, None, self.norm2)
        project, project_bias = fuse_conv_bn(self.project.weight, None, self.norm3)
        return BlockWeights(conv, conv_bias, expand.flatten(1), expand_bias, project.flatten(1), project_bias)


class ConvFirstNet(StageNetwork):
    """Network of `On the Efficiency of Convolutional Neural Networks <https://arxiv.org/abs/2404.03617>`_.

    Args:
        config: which one.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.

    Shapes:
        - input: :math:`(N, C, H, W)`
        - output: :math:`(N, K)`
    """

    config: ConvFirstConfig

    def make_stem(self, in_chans: int) -> nn.Module:
        """Return two 3x3 convolutions of stride 2."""
        width = self.config.widths[0]
        return nn.Sequential(
            nn.Conv2d(in_chans, width // 2, 3, 2, 1, bias=False),
            nn.BatchNorm2d(width // 2),
            nn.ReLU(),
            nn.Conv2d(width // 2, width, 3, 2, 1, bias=False),
            nn.BatchNorm2d(width),
        )

    def make_downsample(self, stage: int) -> nn.Module:
        """Return a 2x2 convolution of stride 2."""
        before, after = self.config.widths[stage - 1 : stage + 1]
        return nn.Sequential(nn.Conv2d(before, after, 2, 2, bias=False), nn.BatchNorm2d(after))

    def make_block(self, stage: int, index: int, drop: float) -> nn.Module:
        """Return a block of `stage`."""
        return ConvFirstBlock(self.config.widths[stage], self.config, drop)

    def make_head(self) -> nn.Module:
        """Return a head whose batch norm stands before the pooling."""
        return Head(nn.BatchNorm2d(self.num_features), self.config.drop_rate, norm_first=True)


VARIANTS = {
    "convfirstnet_tiny": Variant(ConvFirstNet, ConvFirstConfig()),
    "convfirstnet_test": Variant(ConvFirstNet, ConvFirstConfig((1, 1, 2, 1), (16, 16, 24, 32)), size=64),
}
