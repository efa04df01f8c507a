"""PoolFormer, PoolFormerV2, ConvFormer and CAFormer: MetaFormers with the simplest token mixers.

Papers: Yu et al., MetaFormer Is Actually What You Need for Vision, https://arxiv.org/abs/2111.11418 (PoolFormer);
MetaFormer Baselines for Vision, https://arxiv.org/abs/2210.13452 (the others). Parameter names are those of the
public weights (timm's form).
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from omniconv.layers.attention.self_attention import SelfAttention2d
from omniconv.layers.norm.layer_norm2d import LayerNorm2d
from omniconv.models.backbone import Variant
from omniconv.models.image.stages import MetaFormerBlock, Mlp, StageConfig, StageNetwork

__all__ = ["MetaFormer", "MetaFormerConfig"]


@dataclass(frozen=True)
class MetaFormerConfig(StageConfig):
    """What tells one MetaFormer from another.

    Attributes:
        mixers: each stage's token mixer: "pool" (3x3 average minus the pixel itself), "conv" (inverted separable
            7x7 convolution) or "attention".
        norm: over each pixel's channels ("layer") or over the whole map ("group").
        eps: of the blocks' norms.
        bias: of the blocks' norms and MLPs.
        act: the MLPs' activation.
        stem_norm: layer norm after the stem and before every downsampling.
        layer_scale: initial factor of the residual branches; None for none.
        res_scale: initial factor of the shortcuts of all but the first two stages; None for none.
        mlp_head: a hidden layer with squared ReLU and norm in the classifier.
    """

    mixers: tuple[Literal["pool", "conv", "attention"], ...] = ("pool",) * 4
    norm: Literal["layer", "group"] = "layer"
    eps: float = 1e-6
    bias: bool = False
    act: Literal["gelu", "star_relu"] = "star_relu"
    stem_norm: bool = True
    layer_scale: float | None = None
    res_scale: float | None = 1.0
    mlp_head: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.mixers) != len(self.depths):
            raise ValueError(f"depths and mixers must be equally long: got {self.depths} and {self.mixers}")


class PixelMean(nn.Module):
    """PoolFormer's mixer: the mean of the 3x3 neighbours inside the map, less the pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return by how much the neighbourhood of every pixel differs from it."""
        return self.pool(x) - x


class StarReLU(nn.Module):
    r"""Squared ReLU with a learned scale and bias, :math:`s \max(x, 0)^2 + b`."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Activate `x`."""
        return self.scale * x.relu().square() + self.bias


class SeparableConv(nn.Module):
    """ConvFormer's mixer: 1x1 convolution to twice the channels, StarReLU, 7x7 depthwise and 1x1 back."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = 2 * channels
        self.pwconv1 = nn.Conv2d(channels, inner, 1, bias=False)
        self.act1 = StarReLU()
        self.dwconv = nn.Conv2d(inner, inner, 7, padding=3, groups=inner, bias=False)
        self.pwconv2 = nn.Conv2d(inner, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mix every pixel with its 7x7 neighbourhood."""
        return self.pwconv2(self.dwconv(self.act1(self.pwconv1(x))))


class MlpClassifier(nn.Module):
    """Hidden layer of four times the features, squared ReLU, norm and linear layer."""

    def __init__(self, features: int, num_classes: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(features, 4 * features)
        self.norm = nn.LayerNorm(4 * features, eps=1e-6)
        self.fc2 = nn.Linear(4 * features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of (N, features)."""
        return self.fc2(self.norm(self.fc1(x).relu().square()))


def without_bias(norm: nn.Module) -> nn.Module:
    """Return `norm` with its scale alone."""
    norm.register_parameter("bias", None)
    return norm


class MetaFormer(StageNetwork):
    """Network of `MetaFormer Baselines for Vision <https://arxiv.org/abs/2210.13452>`_, and PoolFormer.

    Args:
        config: which one.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.

    Shapes:
        - input: :math:`(N, C, H, W)`
        - output: :math:`(N, K)`
    """

    config: MetaFormerConfig

    def _norm(self, channels: int) -> nn.Module:
        config = self.config
        layer = config.norm == "layer"
        norm = LayerNorm2d(channels, config.eps) if layer else nn.GroupNorm(1, channels, config.eps)
        return norm if config.bias else without_bias(norm)

    def _map_norm(self, channels: int) -> nn.Module:
        return without_bias(LayerNorm2d(channels)) if self.config.stem_norm else nn.Identity()

    def make_stem(self, in_chans: int) -> nn.Module:
        """Return a 7x7 convolution of stride 4 and its norm."""
        width = self.config.widths[0]
        conv = nn.Conv2d(in_chans, width, 7, 4, 2)
        return nn.Sequential(OrderedDict(conv=conv, norm=self._map_norm(width)))

    def make_downsample(self, stage: int) -> nn.Module:
        """Return a norm and a 3x3 convolution of stride 2."""
        before, after = self.config.widths[stage - 1 : stage + 1]
        conv = nn.Conv2d(before, after, 3, 2, 1)
        return nn.Sequential(OrderedDict(norm=self._map_norm(before), conv=conv))

    def make_mixer(self, stage: int) -> nn.Module:
        """Return the token mixer of a block of `stage`."""
        mixer, width = self.config.mixers[stage], self.config.widths[stage]
        if mixer == "attention":
            return SelfAttention2d(width, max(1, width // 32), bias=False)
        return PixelMean() if mixer == "pool" else SeparableConv(width)

    def make_block(self, stage: int, index: int, drop: float) -> nn.Module:
        """Return a block of `stage`."""
        config, width = self.config, self.config.widths[stage]
        act = nn.GELU() if config.act == "gelu" else StarReLU()
        return MetaFormerBlock(
            width,
            self.make_mixer(stage),
            Mlp(width, 4 * width, act, bias=config.bias, linear=config.mixers[stage] == "attention"),
            self._norm,
            layer_scale=config.layer_scale,
            res_scale=config.res_scale if stage >= 2 else None,
            drop=drop,
        )

    def make_classifier(self, num_classes: int) -> nn.Module:
        """Return a linear layer, or two with a squared ReLU and a norm between them."""
        if self.config.mlp_head:
            return MlpClassifier(self.num_features, num_classes)
        return super().make_classifier(num_classes)


_SMALL, _MEDIUM, _BASE = (64, 128, 320, 512), (96, 192, 384, 768), (128, 256, 512, 768)
_S12, _S24, _S36, _M48 = (2, 2, 6, 2), (4, 4, 12, 4), (6, 6, 18, 6), (8, 8, 24, 8)
_S18, _B36 = (3, 3, 9, 3), (3, 12, 18, 3)
_MEDIUM36 = (96, 192, 384, 576)


def _v1(
    depths: tuple[int, ...],
    widths: tuple[int, ...],
    layer_scale: float,
    params: float | None = None,
    macs: float | None = None,
) -> Variant:
    config = MetaFormerConfig(
        depths, widths, mixers=("pool",) * len(depths), norm="group", eps=1e-5, bias=True, act="gelu",
        stem_norm=False, layer_scale=layer_scale, res_scale=None, mlp_head=False,
    )  # fmt: skip
    return Variant(MetaFormer, config, params, macs)


def _v2(depths, widths, params: float, macs: float) -> Variant:
    return Variant(MetaFormer, MetaFormerConfig(depths, widths, norm="group", mlp_head=False), params, macs)


def _conv(depths, widths, params: float, macs: float) -> Variant:
    return Variant(MetaFormer, MetaFormerConfig(depths, widths, mixers=("conv",) * 4), params, macs)


def _ca(depths, widths, params: float, macs: float) -> Variant:
    mixers = ("conv", "conv", "attention", "attention")
    return Variant(MetaFormer, MetaFormerConfig(depths, widths, mixers=mixers), params, macs)


VARIANTS = {
    "poolformer_s12": _v1(_S12, _SMALL, 1e-5, 11.9e6, 1.8e9),
    "poolformer_s24": _v1(_S24, _SMALL, 1e-5, 21.4e6, 3.4e9),
    "poolformer_s36": _v1(_S36, _SMALL, 1e-6, 30.8e6, 5.0e9),
    "poolformer_m36": _v1(_S36, _MEDIUM, 1e-6, 56.1e6, 8.8e9),
    "poolformer_m48": _v1(_M48, _MEDIUM, 1e-6, 73.4e6, 11.6e9),
    "poolformerv2_s12": _v2(_S12, _SMALL, 11.9e6, 1.8e9),
    "poolformerv2_s24": _v2(_S24, _SMALL, 21.3e6, 3.4e9),
    "poolformerv2_s36": _v2(_S36, _SMALL, 30.8e6, 5.0e9),
    "poolformerv2_m36": _v2(_S36, _MEDIUM, 56.1e6, 8.8e9),
    "poolformerv2_m48": _v2(_M48, _MEDIUM, 73.4e6, 11.6e9),
    "convformer_s18": _conv(_S18, _SMALL, 27e6, 3.9e9),
    "convformer_s36": _conv(_B36, _SMALL, 40e6, 7.6e9),
    "convformer_m36": _conv(_B36, _MEDIUM36, 57e6, 12.8e9),
    "convformer_b36": _conv(_B36, _BASE, 100e6, 22.6e9),
    "caformer_s18": _ca(_S18, _SMALL, 26e6, 4.1e9),
    "caformer_s36": _ca(_B36, _SMALL, 39e6, 8.0e9),
    "caformer_m36": _ca(_B36, _MEDIUM36, 56e6, 13.2e9),
    "caformer_b36": _ca(_B36, _BASE, 99e6, 23.2e9),
    "poolformer_test": _v1((1, 1), (8, 16), 1e-5),
    "caformer_test": Variant(
        MetaFormer, MetaFormerConfig((1, 1, 1), (8, 16, 32), mixers=("pool", "conv", "attention")), size=32
    ),
}  # fmt: skip
