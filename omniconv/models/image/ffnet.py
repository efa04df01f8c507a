"""FFNet: token and channel mixers that are both a query, keys and values made of convolutions.

Paper: Yun et al., MetaMixer Is All You Need, https://arxiv.org/abs/2406.02021. `deploy()` merges every pair of parallel
kernels, every batch norm but the last, and the shortcuts of the downsamplings.
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from omniconv.layers.attention.metamixer import FFNifiedAttention
from omniconv.layers.conv.conv_norm import ConvNorm2d
from omniconv.layers.conv.rep_depthwise import RepDepthwiseConv2d
from omniconv.models.backbone import Variant
from omniconv.models.image.stages import Head, MetaFormerBlock, StageConfig, StageNetwork
from omniconv.models.weights import Rules

__all__ = ["FFNet", "FFNetConfig"]


@dataclass(frozen=True)
class FFNetConfig(StageConfig):
    """What tells one FFNet from another.

    Attributes:
        stem_width: channels of the stem's first convolution.
        kernel_sizes: of each stage's keys and values.
        mlp_kernel_size: of the depthwise convolution that opens the channel mixers.
        layer_scale: initial scale of every residual branch; None for none.
    """

    depths: tuple[int, ...] = (2, 2, 8, 2)
    widths: tuple[int, ...] = (80, 160, 320, 640)
    stem_width: int = 64
    kernel_sizes: tuple[int, ...] = (3, 3, 7, 7)
    mlp_kernel_size: int = 3
    layer_scale: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.kernel_sizes) != len(self.depths):
            raise ValueError(
                f"depths and kernel_sizes must be equally long: got {self.depths} and {self.kernel_sizes}"
            )


class ResidualPointwise(nn.Module):
    """Batch norm and 1x1 convolution beside a shortcut: together one 1x1 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Add to `x` its normed mixture of channels."""
        return x + self.conv(self.norm(x))

    def merged(self) -> nn.Conv2d:
        """Return the 1x1 convolution that equals this module in eval mode."""
        norm, mix = self.norm, self.conv.weight[:, :, 0, 0]
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        weight = mix * scale + torch.eye(len(mix), dtype=mix.dtype, device=mix.device)
        conv = nn.Conv2d(len(mix), len(mix), 1, dtype=mix.dtype, device=mix.device)
        conv.weight = nn.Parameter(weight[:, :, None, None].detach())
        conv.bias = nn.Parameter((mix @ (norm.bias - norm.running_mean * scale)).detach())
        return conv


class FFNet(StageNetwork):
    """Network of `MetaMixer Is All You Need <https://arxiv.org/abs/2406.02021>`_.

    Args:
        config: which one.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.

    Shapes:
        - input: :math:`(N, C, H, W)`
        - output: :math:`(N, K)`
    """

    config: FFNetConfig

    def make_stem(self, in_chans: int) -> nn.Module:
        """Return two 3x3 convolutions of stride 2 with batch norm, and GELU between them."""
        first, width = self.config.stem_width, self.config.widths[0]
        return nn.Sequential(
            ConvNorm2d(in_chans, first, 3, stride=2), nn.GELU(), ConvNorm2d(first, width, 3, stride=2)
        )

    def make_downsample(self, stage: int) -> nn.Module:
        """Return a 7x7 depthwise convolution of stride 2 that doubles the channels, and a 1x1 mixture of them."""
        before, after = self.config.widths[stage - 1 : stage + 1]
        return nn.Sequential(
            RepDepthwiseConv2d(before, multiplier=after // before, stride=2), ResidualPointwise(after)
        )

    def make_channel_mixer(self, width: int) -> nn.Module:
        """Return a depthwise convolution, and two pointwise ones with GELU between them."""
        kernel = self.config.mlp_kernel_size
        parts: OrderedDict[str, nn.Module] = OrderedDict(
            conv=RepDepthwiseConv2d(width, kernel, kernel // 2)
            if kernel >= 7
            else ConvNorm2d(width, width, kernel, groups=width),
            fc1=nn.Conv2d(width, 3 * width, 1),
            act=nn.GELU(),
            fc2=nn.Conv2d(3 * width, width, 1),
        )
        return nn.Sequential(parts)

    def make_block(self, stage: int, index: int, drop: float) -> nn.Module:
        """Return a block of `stage`; the norms are inside its mixers."""
        config, width = self.config, self.config.widths[stage]
        return MetaFormerBlock(
            width,
            FFNifiedAttention(width, config.kernel_sizes[stage]),
            self.make_channel_mixer(width),
            nn.Identity,
            layer_scale=config.layer_scale,
            drop=drop,
        )

    def make_head(self) -> nn.Module:
        """Return a head with a batch norm."""
        return Head(nn.BatchNorm2d(self.num_features), self.config.drop_rate, norm_first=True)


OFFICIAL_NAMES: Rules = (
    (r"^patch_embed\.", "stem."),
    (r"^stages\.(\d+)\.0\.proj\.0\.", r"stages.\1.downsample.0."),
    (r"^stages\.(\d+)\.0\.proj\.1\.conv\.c\.", r"stages.\1.downsample.1.conv."),
    (r"^stages\.(\d+)\.0\.proj\.1\.conv\.bn\.", r"stages.\1.downsample.1.norm."),
    # The first entry of the later stages is the downsampling.
    (r"^stages\.0\.(\d+)\.", r"stages.0.blocks.\1."),
    *((rf"^stages\.([1-9])\.{n}\.(?=token|channel)", rf"stages.\1.blocks.{n - 1}.") for n in range(1, 32)),
    (r"\.token_mixer\.0\.layer_scale$", ".layer_scale1.scale"),
    (r"\.channel_mixer\.layer_scale$", ".layer_scale2.scale"),
    (r"\.token_mixer\.0\.main\.fc\.", ".token_mixer.query."),
    (r"\.token_mixer\.0\.main\.conv1\.", ".token_mixer.keys."),
    (r"\.token_mixer\.0\.main\.conv2\.", ".token_mixer.values."),
    (r"\.channel_mixer\.main\.", ".mlp."),
    (r"\.conv1\.(c|bn)\.", r".small.\1."),
    (r"\.(keys|values|conv|0)\.conv\.(c|bn)\.", r".\1.large.\2."),
    (r"\.c\.", ".conv."),
    (r"\.bn\.", ".norm."),
    (r"^norm\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)
"""From https://github.com/ysj9909/FFNet; their scales have two more axes."""


def _row(depths: tuple[int, ...], width: int, params: float, macs: float, size: int = 256, **more) -> Variant:
    widths = (width, 2 * width, 4 * width, 8 * width)
    return Variant(FFNet, FFNetConfig(depths, widths, **more), params, macs, size, deployed=True)


VARIANTS = {
    "ffnet_1": _row((2, 2, 8, 2), 80, 13.7e6, 2.9e9),
    "ffnet_2": _row((3, 3, 15, 3), 88, 26.9e6, 6.0e9, mlp_kernel_size=7),
    "ffnet_3": _row((4, 4, 22, 5), 96, 48.3e6, 10.1e9, mlp_kernel_size=7, layer_scale=1e-6),
    "ffnet_4": _row((4, 4, 27, 3), 128, 79.2e6, 43.1e9, 384, mlp_kernel_size=7, layer_scale=1e-6),
    "ffnet_test": Variant(
        FFNet,
        FFNetConfig((1, 1), (8, 16), stem_width=6, kernel_sizes=(3, 7), mlp_kernel_size=7, layer_scale=1e-6),
        size=32,
    ),
}
