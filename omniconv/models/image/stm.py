"""One network for every token mixer: what is compared is the mixer and nothing else.

Paper: Hu et al., Demystify Transformers & Convolutions in Modern Image Deep Networks,
https://arxiv.org/abs/2211.05781 (the "unified architecture" of its spatial token mixers, STM). `MIXERS` is open: put a
factory into it and its name into the configuration.

    MIXERS["mine"] = lambda channels, place: MyMixer(channels)
    create_model("stm_depthwise_micro", mixer="mine")

The variants have the depths and widths of the official code, which differ a little so that the parameters agree. With
MSA-Conv as its mixer the network stands for TiC, Zhang et al., https://arxiv.org/abs/2310.04134, as well.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from omniconv.core.config import closest
from omniconv.core.errors import UsageError
from omniconv.layers.attention.halo import HaloAttention
from omniconv.layers.attention.msa_conv import MSAConv2d
from omniconv.layers.attention.spatial_reduction import SpatialReductionAttention
from omniconv.layers.attention.window import WindowAttention
from omniconv.layers.conv.dcn import DCNv3
from omniconv.layers.norm.layer_norm2d import LayerNorm2d
from omniconv.models.backbone import Variant
from omniconv.models.image.stages import Head, MetaFormerBlock, Mlp, StageConfig, StageNetwork

__all__ = ["MIXERS", "STM", "Mixer", "Place", "STMConfig"]


@dataclass(frozen=True)
class Place:
    """Where in the network a mixer stands.

    Attributes:
        stage: counted from 0 at the finest of `stages`.
        stages: how many there are.
        index: of the block within its stage.
        window: pixels along a side of what the mixers with windows, blocks or kernels see at once.
    """

    stage: int
    stages: int
    index: int
    window: int


Mixer = Callable[[int, Place], nn.Module]
"""Makes, for channels C at a place, a module from maps (N, C, H, W) to maps of the same shape."""


def _heads(channels: int) -> int:
    """Return the number of heads of 32 channels, at least one."""
    return max(1, channels // 32)


def _halo(channels: int, place: Place) -> nn.Module:
    halo = max(1, 3 * place.window // 7)
    attention = HaloAttention(channels, num_heads=_heads(channels), block_size=place.window, halo_size=halo)
    return nn.Sequential(attention, nn.Conv2d(channels, channels, 1))


def _reduction(channels: int, place: Place) -> nn.Module:
    return SpatialReductionAttention(channels, _heads(channels), 2 ** (place.stages - 1 - place.stage))


def _window(channels: int, place: Place) -> nn.Module:
    shift = place.window // 2 if place.index % 2 else 0
    return WindowAttention(channels, num_heads=_heads(channels), window_size=place.window, shift=shift)


def _depthwise(channels: int, place: Place) -> nn.Module:
    kernel = place.window | 1
    return nn.Sequential(
        nn.Conv2d(channels, channels, 1),
        nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels),
        nn.Conv2d(channels, channels, 1),
    )


def _msa_conv(channels: int, place: Place) -> nn.Module:
    heads = channels // 8 if channels % 8 == 0 else 1
    return MSAConv2d(channels, num_heads=heads, groups=channels, shift=place.window, pool=2)


def _dcnv3(channels: int, place: Place) -> nn.Module:
    return DCNv3(channels, groups=max(1, channels // 16))


MIXERS: dict[str, Mixer] = {
    "halo": _halo,
    "reduction": _reduction,
    "window": _window,
    "depthwise": _depthwise,
    "dcnv3": _dcnv3,
    "msa_conv": _msa_conv,
}


@dataclass(frozen=True)
class STMConfig(StageConfig):
    """What tells one network from another.

    Attributes:
        mixer: name in `MIXERS`.
        window: pixels along a side of windows, blocks and depthwise kernels (the next odd number there).
        mlp_ratios: hidden channels of each stage's MLPs, in units of its width; 4 everywhere if empty.
        layer_scale: initial factor of the residual branches; None for none.
        head_ratio: channels of the last 1x1 convolution, in units of the last width.
    """

    depths: tuple[int, ...] = (2, 2, 9, 2)
    widths: tuple[int, ...] = (32, 64, 128, 256)
    mixer: str = "depthwise"
    window: int = 7
    mlp_ratios: tuple[int, ...] = ()
    layer_scale: float | None = 1e-6
    head_ratio: float = 1.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mlp_ratios and len(self.mlp_ratios) != len(self.depths):
            raise ValueError(f"mlp_ratios needs one ratio a stage: got {self.mlp_ratios}")


class STM(StageNetwork):
    """Network of `Demystify Transformers & Convolutions <https://arxiv.org/abs/2211.05781>`_.

    A stem of two 3x3 convolutions, downsampling by 3x3 convolutions, blocks of a token mixer and an MLP, a norm after
    every stage, and a 1x1 convolution before the pooling.

    Args:
        config: which one.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.

    Shapes:
        - input: :math:`(N, C, H, W)`
        - output: :math:`(N, K)`

    Raises:
        UsageError: if `MIXERS` has no mixer of the configured name.
    """

    config: STMConfig

    def make_stem(self, in_chans: int) -> nn.Module:
        """Return two 3x3 convolutions of stride 2, each with a norm."""
        width = self.config.widths[0]
        return nn.Sequential(
            nn.Conv2d(in_chans, width // 2, 3, 2, 1),
            LayerNorm2d(width // 2),
            nn.GELU(),
            nn.Conv2d(width // 2, width, 3, 2, 1),
            LayerNorm2d(width),
        )

    def make_downsample(self, stage: int) -> nn.Module:
        """Return the norm that ends the stage before, and a 3x3 convolution of stride 2 with a norm."""
        before, after = self.config.widths[stage - 1 : stage + 1]
        return nn.Sequential(
            LayerNorm2d(before), nn.Conv2d(before, after, 3, 2, 1, bias=False), LayerNorm2d(after)
        )

    def make_block(self, stage: int, index: int, drop: float) -> nn.Module:
        """Return a block around the mixer of this place."""
        config = self.config
        if config.mixer not in MIXERS:
            raise UsageError(f"no mixer {config.mixer!r}{closest(config.mixer, list(MIXERS))}")
        width = config.widths[stage]
        ratio = config.mlp_ratios[stage] if config.mlp_ratios else 4
        return MetaFormerBlock(
            width,
            MIXERS[config.mixer](width, Place(stage, len(config.depths), index, config.window)),
            Mlp(width, ratio * width, nn.GELU()),
            LayerNorm2d,
            layer_scale=config.layer_scale,
            drop=drop,
        )

    def make_head(self) -> nn.Module:
        """Return norm, 1x1 convolution with batch norm and GELU, pooling and classifier."""
        width = self.config.widths[-1]
        inner = int(width * self.config.head_ratio)
        layers = (
            LayerNorm2d(width),
            nn.Conv2d(width, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.GELU(),
        )
        return Head(nn.Sequential(*layers), self.config.drop_rate, norm_first=True)

    def make_classifier(self, num_classes: int) -> nn.Module:
        """Return a linear layer from the 1x1 convolution's channels."""
        return nn.Linear(int(self.config.widths[-1] * self.config.head_ratio), num_classes)


def _sizes(mixer: str, *sizes: tuple[str, tuple[int, ...], int]) -> dict[str, Variant]:
    return {
        f"stm_{mixer}_{size}": Variant(
            STM, STMConfig(depths, tuple(width * 2**stage for stage in range(4)), mixer=mixer)
        )
        for size, depths, width in sizes
    }


def _pvt(depths: tuple[int, ...], widths: tuple[int, ...], ratios: tuple[int, ...]) -> Variant:
    return Variant(STM, STMConfig(depths, widths, mixer="reduction", mlp_ratios=ratios))


_ATTENTION: tuple[Any, ...] = (
    ("micro", (2, 2, 9, 2), 32), ("tiny", (2, 2, 6, 2), 96), ("small", (2, 2, 18, 2), 96), ("base", (2, 2, 18, 2), 128),
)  # fmt: skip

VARIANTS = {
    **_sizes("halo", *_ATTENTION),
    **_sizes("window", *_ATTENTION),
    **_sizes("msa_conv", *_ATTENTION),
    **_sizes(
        "depthwise",
        ("micro", (3, 3, 8, 3), 32), ("tiny", (2, 2, 9, 2), 96),
        ("small", (2, 2, 24, 2), 96), ("base", (2, 2, 24, 2), 128),
    ),
    **_sizes(
        "dcnv3",
        ("micro", (2, 2, 9, 2), 32), ("tiny", (4, 4, 18, 4), 64),
        ("small", (4, 4, 21, 4), 80), ("base", (4, 4, 21, 4), 112),
    ),
    "stm_reduction_micro": _pvt((2, 2, 3, 2), (32, 64, 160, 256), (8, 8, 4, 4)),
    "stm_reduction_tiny": _pvt((3, 4, 9, 3), (64, 128, 320, 512), (8, 8, 4, 4)),
    "stm_reduction_small": _pvt((3, 4, 21, 3), (64, 128, 320, 512), (8, 8, 4, 4)),
    "stm_reduction_base": _pvt((3, 8, 45, 3), (64, 128, 320, 512), (4, 4, 4, 4)),
    "stm_test": Variant(
        STM, STMConfig((2, 1), (8, 16), mixer="window", window=4, mlp_ratios=(2, 1), layer_scale=None), size=32
    ),
}  # fmt: skip
