"""HorNet: transformer-like blocks in which recursive gated convolution takes the place of attention.

Paper: Rao et al., https://arxiv.org/abs/2207.14284. The order of the interactions rises from two in the first stage to
five in the last; the "GF" networks filter the whole map in the last two stages instead of a 7x7 window.
"""

from dataclasses import dataclass

from torch import nn

from omniconv.layers.conv.recursive_gated import RecursiveGatedConv2d
from omniconv.layers.norm.layer_norm2d import LayerNorm2d
from omniconv.models.backbone import Variant
from omniconv.models.image.stages import MetaFormerBlock, Mlp, StageConfig, StageNetwork
from omniconv.models.weights import Rules

__all__ = ["HorNet", "HorNetConfig"]


@dataclass(frozen=True)
class HorNetConfig(StageConfig):
    """What tells one HorNet from another.

    Attributes:
        filters: size of the maps for which each stage's global filters hold one number a frequency; None for a
            7x7 depthwise convolution instead.
        layer_scale: initial scale of every residual branch.
    """

    depths: tuple[int, ...] = (2, 3, 18, 2)
    widths: tuple[int, ...] = (64, 128, 256, 512)
    filters: tuple[tuple[int, int] | None, ...] = (None,) * 4
    layer_scale: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.filters) != len(self.depths):
            raise ValueError(f"depths and filters must be equally long: got {self.depths} and {self.filters}")


class HorNet(StageNetwork):
    """Network of `HorNet <https://arxiv.org/abs/2207.14284>`_.

    Args:
        config: which one.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.

    Shapes:
        - input: :math:`(N, C, H, W)`
        - output: :math:`(N, K)`
    """

    config: HorNetConfig

    def make_stem(self, in_chans: int) -> nn.Module:
        """Return a 4x4 convolution of stride 4 and a norm."""
        width = self.config.widths[0]
        return nn.Sequential(nn.Conv2d(in_chans, width, 4, 4), LayerNorm2d(width))

    def make_downsample(self, stage: int) -> nn.Module:
        """Return a norm and a 2x2 convolution of stride 2."""
        before, after = self.config.widths[stage - 1 : stage + 1]
        return nn.Sequential(LayerNorm2d(before), nn.Conv2d(before, after, 2, 2))

    def make_block(self, stage: int, index: int, drop: float) -> nn.Module:
        """Return a block of `stage`, whose interactions are of order `stage` + 2."""
        config, width = self.config, self.config.widths[stage]
        mixer = RecursiveGatedConv2d(width, stage + 2, filter_size=config.filters[stage])
        mlp = Mlp(width, 4 * width, nn.GELU(), linear=True)
        return MetaFormerBlock(width, mixer, mlp, LayerNorm2d, layer_scale=config.layer_scale, drop=drop)


OFFICIAL_NAMES: Rules = (
    (r"^downsample_layers\.0\.", "stem."),
    (r"^stages\.(\d+)\.", r"stages.\1.blocks."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"\.gnconv\.", ".token_mixer."),
    (r"\.pwconv([12])\.", r".mlp.fc\1."),
    (r"\.gamma([12])$", r".layer_scale\1.scale"),
    (r"^norm\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)
"""From https://github.com/raoyongming/HorNet."""


def _row(
    width: int,
    params: float,
    macs: float,
    filters: tuple[int, int] | None = None,
    size: int = 224,
    classes: int = 1000,
) -> Variant:
    widths = (width, 2 * width, 4 * width, 8 * width)
    config = HorNetConfig(widths=widths)
    if filters:
        third, last = ((side, side) for side in filters)
        config = HorNetConfig(widths=widths, filters=(None, None, third, last))
    return Variant(HorNet, config, params, macs, size, classes)


VARIANTS = {
    "hornet_tiny_7x7": _row(64, 22.41e6, 4.0e9),
    "hornet_tiny_gf": _row(64, 22.99e6, 3.9e9, (14, 7)),
    "hornet_small_7x7": _row(96, 49.53e6, 8.8e9),
    "hornet_small_gf": _row(96, 50e6, 8.7e9, (14, 7)),
    "hornet_base_7x7": _row(128, 87.26e6, 15.6e9),
    "hornet_base_gf": _row(128, 88e6, 15.5e9, (14, 7)),
    # Counted with the 10,450 classes of ImageNet-22K's later release.
    "hornet_large_7x7": _row(192, 209e6, 34.8e9, classes=10450),
    "hornet_large_gf": _row(192, 211e6, 34.7e9, (14, 7), classes=10450),
    "hornet_large_gf_img384": _row(192, 216e6, 101.8e9, (24, 12), 384, 10450),
    "hornet_test": Variant(HorNet, HorNetConfig((1, 1), (8, 16), filters=(None, (5, 6))), size=32),
}
