"""RecNeXt: recursive convolutions whose receptive field is the map's own size in every stage.

Paper: Zhao et al., RecConv, https://arxiv.org/abs/2412.19628, the convolutional "M" networks. Two classifiers, one of
which learns from a teacher where there is one, are averaged; `deploy()` merges them, and every convolution with its
batch norm.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from omniconv.layers.conv.conv_norm import ConvNorm2d
from omniconv.layers.conv.recursive import RecursiveConv2d
from omniconv.models.backbone import Variant
from omniconv.models.image.stages import Head, MetaNeXtBlock, StageConfig, StageNetwork
from omniconv.models.weights import Rules

__all__ = ["RecNeXt", "RecNeXtConfig"]


@dataclass(frozen=True)
class RecNeXtConfig(StageConfig):
    """What tells one RecNeXt from another.

    Attributes:
        levels: of each stage's recursive convolutions.
    """

    depths: tuple[int, ...] = (2, 2, 9, 1)
    widths: tuple[int, ...] = (40, 80, 160, 320)
    levels: tuple[int, ...] = (4, 3, 2, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.levels) != len(self.depths):
            raise ValueError(f"depths and levels must be equally long: got {self.depths} and {self.levels}")


def make_mlp(channels: int) -> nn.Module:
    """Return two pointwise convolutions with batch norm, GELU and twice the channels between them."""
    return nn.Sequential(ConvNorm2d(channels, 2 * channels), nn.GELU(), ConvNorm2d(2 * channels, channels))


class Downsample(nn.Module):
    """7x7 depthwise convolution of stride 2 that widens, batch norm, and an MLP on a residual branch."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.token_mixer = nn.Conv2d(in_channels, out_channels, 7, 2, 3, groups=in_channels)
        self.norm = nn.BatchNorm2d(out_channels)
        self.mlp = make_mlp(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return the smaller map."""
        x = self.norm(self.token_mixer(x))
        return x + self.mlp(x)


class NormLinear(nn.Module):
    """Batch norm and a linear layer."""

    def __init__(self, features: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(features)
        self.linear = nn.Linear(features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.linear(self.norm(x))

    def merged(self) -> nn.Linear:
        """Return the linear layer that equals this module in eval mode."""
        norm, linear = self.norm, self.linear
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        merged = nn.Linear(linear.in_features, linear.out_features).to(linear.weight)
        merged.weight = nn.Parameter((linear.weight * scale).detach())
        shift = norm.bias - norm.running_mean * scale
        merged.bias = nn.Parameter((linear.bias + linear.weight @ shift).detach())
        return merged


class MeanClassifier(nn.Module):
    """Mean of two classifiers; the second is for a teacher's labels."""

    def __init__(self, features: int, num_classes: int) -> None:
        super().__init__()
        self.head = NormLinear(features, num_classes)
        self.head_dist = NormLinear(features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return (self.head(x) + self.head_dist(x)) / 2

    def merged(self) -> nn.Linear:
        """Return the linear layer that equals this module in eval mode."""
        linear, other = self.head.merged(), self.head_dist.merged()
        linear.weight = nn.Parameter(((linear.weight + other.weight) / 2).detach())
        linear.bias = nn.Parameter(((linear.bias + other.bias) / 2).detach())
        return linear


def init_linear(module: nn.Module) -> None:
    """Draw linear layers from a normal distribution of deviation 0.02; convolutions stay as torch draws them."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


class RecNeXt(StageNetwork):
    """Network of `RecConv <https://arxiv.org/abs/2412.19628>`_.

    Args:
        config: which one.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.

    Shapes:
        - input: :math:`(N, C, H, W)`
        - output: :math:`(N, K)`
    """

    config: RecNeXtConfig
    init_weights = staticmethod(init_linear)

    def make_stem(self, in_chans: int) -> nn.Module:
        """Return two 3x3 convolutions of stride 2 with batch norm, and GELU between them."""
        width = self.config.widths[0]
        return nn.Sequential(
            ConvNorm2d(in_chans, width // 2, 3, stride=2),
            nn.GELU(),
            ConvNorm2d(width // 2, width, 3, stride=2),
        )

    def make_downsample(self, stage: int) -> nn.Module:
        """Return a strided depthwise convolution and an MLP."""
        return Downsample(*self.config.widths[stage - 1 : stage + 1])

    def make_block(self, stage: int, index: int, drop: float) -> nn.Module:
        """Return a block of `stage`."""
        width = self.config.widths[stage]
        mixer = RecursiveConv2d(width, 5, self.config.levels[stage])
        return MetaNeXtBlock(width, mixer, make_mlp(width), drop=drop)

    def make_head(self) -> nn.Module:
        """Return a head whose norms are inside its classifiers."""
        return Head(nn.Identity(), self.config.drop_rate)

    def make_classifier(self, num_classes: int) -> nn.Module:
        """Return two averaged linear layers, each after a batch norm."""
        return MeanClassifier(self.num_features, num_classes)


OFFICIAL_NAMES: Rules = (
    (r"^stem\.stem\.", "stem."),
    (r"\.channel_mixer\.", ".mlp."),
    (r"^head\.", "head.fc."),
)
"""From https://github.com/suous/RecNeXt."""


def _row(depths: tuple[int, ...], width: int, params: float, macs: float | None) -> Variant:
    widths = (width, 2 * width, 4 * width, 8 * width)
    return Variant(RecNeXt, RecNeXtConfig(depths, widths), params, macs, deployed=True)


VARIANTS = {
    "recnext_m0": _row((2, 2, 9, 1), 40, 2.5e6, 0.4e9),
    # Published as 0.9 and 1.2 G, which are 0.85 and 1.15 rounded up.
    "recnext_m1": _row((3, 3, 15, 2), 48, 5.2e6, None),
    "recnext_m2": _row((3, 3, 15, 2), 56, 6.8e6, None),
    "recnext_m3": _row((3, 3, 13, 2), 64, 8.2e6, 1.4e9),
    "recnext_m4": _row((5, 5, 25, 4), 64, 14.1e6, 2.4e9),
    "recnext_m5": _row((7, 7, 35, 2), 80, 22.9e6, 4.7e9),
    "recnext_test": Variant(RecNeXt, RecNeXtConfig((1, 1), (8, 16), levels=(2, 1)), size=32),
}
