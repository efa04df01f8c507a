"""InceptionNeXt: ConvNeXt with its large kernel decomposed into a square, two bands and nothing.

Paper: Yu et al., https://arxiv.org/abs/2303.16900. The norm is a batch norm, the MLP of the last stage is narrower,
and the classifier has a hidden layer. Parameter names are those of the public weights (timm's form).
"""

from dataclasses import dataclass

from torch import Tensor, nn

from omniconv.layers.conv.inception_depthwise import InceptionDepthwiseConv2d
from omniconv.models.backbone import Variant
from omniconv.models.image.stages import MetaNeXtBlock, Mlp, StageConfig, StageNetwork

__all__ = ["InceptionNeXt", "InceptionNeXtConfig"]


@dataclass(frozen=True)
class InceptionNeXtConfig(StageConfig):
    """What tells one InceptionNeXt from another.

    Attributes:
        mlp_ratios: hidden over outer channels of each stage's MLPs.
        band_kernel_size: length of the two bands, odd.
        branch_ratio: share of the channels that each of the three convolutions takes.
        layer_scale: initial scale of every residual branch.
    """

    depths: tuple[int, ...] = (3, 3, 9, 3)
    widths: tuple[int, ...] = (96, 192, 384, 768)
    mlp_ratios: tuple[int, ...] = (4, 4, 4, 3)
    band_kernel_size: int = 11
    branch_ratio: float = 0.125
    layer_scale: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.mlp_ratios) != len(self.depths):
            raise ValueError(
                f"depths and mlp_ratios must be equally long: got {self.depths} and {self.mlp_ratios}"
            )


class MlpHead(nn.Module):
    """Average pooling, a hidden layer three times as wide with GELU and norm, and the classifier."""

    def __init__(self, channels: int, drop_rate: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, 3 * channels)
        self.act = nn.GELU()
        self.norm = nn.LayerNorm(3 * channels, eps=1e-6)
        self.drop = nn.Dropout(drop_rate)
        self.fc2: nn.Module = nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits of a map, or what enters the classifier if `pre_logits`."""
        x = self.drop(self.norm(self.act(self.fc1(x.mean((2, 3))))))
        return x if pre_logits else self.fc2(x)


class InceptionNeXt(StageNetwork):
    """Network of `InceptionNeXt <https://arxiv.org/abs/2303.16900>`_.

    Args:
        config: which one.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.

    Shapes:
        - input: :math:`(N, C, H, W)`
        - output: :math:`(N, K)`
    """

    config: InceptionNeXtConfig

    def make_stem(self, in_chans: int) -> nn.Module:
        """Return a 4x4 convolution of stride 4 and a norm."""
        width = self.config.widths[0]
        return nn.Sequential(nn.Conv2d(in_chans, width, 4, 4), nn.BatchNorm2d(width))

    def make_downsample(self, stage: int) -> nn.Module:
        """Return a norm and a 2x2 convolution of stride 2."""
        before, after = self.config.widths[stage - 1 : stage + 1]
        return nn.Sequential(nn.BatchNorm2d(before), nn.Conv2d(before, after, 2, 2))

    def make_block(self, stage: int, index: int, drop: float) -> nn.Module:
        """Return a block of `stage`."""
        config, width = self.config, self.config.widths[stage]
        mixer = InceptionDepthwiseConv2d(width, 3, config.band_kernel_size, config.branch_ratio)
        mlp = Mlp(width, config.mlp_ratios[stage] * width, nn.GELU())
        return MetaNeXtBlock(width, mixer, mlp, layer_scale=config.layer_scale, drop=drop)

    def make_head(self) -> nn.Module:
        """Return a head with a hidden layer."""
        return MlpHead(self.num_features, self.config.drop_rate)

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new classifier for `num_classes` in place; 0 leaves none."""
        self.num_classes = num_classes
        self.head.fc2 = nn.Linear(3 * self.num_features, num_classes) if num_classes else nn.Identity()
        self.init_weights(self.head.fc2)

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.head.get_submodule("fc2")


def _row(depths: tuple[int, ...], width: int, params: float, macs: float, **more) -> Variant:
    widths = (width, 2 * width, 4 * width, 8 * width)
    return Variant(InceptionNeXt, InceptionNeXtConfig(depths, widths, **more), params, macs)


VARIANTS = {
    "inception_next_atto": _row((2, 2, 6, 2), 40, 4.16e6, 0.50e9, band_kernel_size=9, branch_ratio=0.25),
    "inception_next_tiny": _row((3, 3, 9, 3), 96, 28.06e6, 4.19e9),
    "inception_next_small": _row((3, 3, 27, 3), 96, 49.37e6, 8.36e9),
    "inception_next_base": _row((3, 3, 27, 3), 128, 86.67e6, 14.85e9),
    "inception_next_test": Variant(
        InceptionNeXt, InceptionNeXtConfig((1, 1), (16, 24), mlp_ratios=(2, 3), band_kernel_size=5), size=32
    ),
}
