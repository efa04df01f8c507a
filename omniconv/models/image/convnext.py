"""ConvNeXt, its isotropic form and ConvNeXt V2.

Papers: Liu et al., A ConvNet for the 2020s, https://arxiv.org/abs/2201.03545; ConvNeXt V2, Woo et al.,
https://arxiv.org/abs/2301.00808, which puts global response normalisation into the block in place of layer
scale. Parameter names are those of the public weights (timm's form). The steps that lead from ResNet-50 to
ConvNeXt-T are in `modernized_resnet`.
"""

from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from omniconv.layers.drop_path import DropPath
from omniconv.layers.norm.grn import GlobalResponseNorm
from omniconv.layers.norm.layer_norm2d import LayerNorm2d
from omniconv.models.backbone import Backbone, Feature, FeatureInfo, Variant

__all__ = ["ConvNeXt", "ConvNeXtBlock", "ConvNeXtConfig"]


@dataclass(frozen=True)
class ConvNeXtConfig:
    """What tells one ConvNeXt from another.

    Attributes:
        depths: blocks a stage; one stage makes the isotropic form.
        widths: channels of each stage.
        kernel_size: of the depthwise convolutions, odd.
        stem: one `patch_size` x `patch_size` convolution of that stride ("patch"), or two 3x3 of stride 2, the
            first one as wide as the second ("overlap") or half as wide ("tiered").
        patch_size: pixels along a side of the stem's patch.
        stem_norm: layer norm after the stem.
        layer_scale: initial scale of every residual branch; None for no scale.
        conv_mlp: write the pointwise layers as 1x1 convolutions (weights with two more axes) instead of linear
            layers on a channels-last view; the function is the same.
        grn: global response normalisation between the pointwise layers (V2).
        norm_before_pool: the last norm stands before the pooling instead of after it.
        head_width: width of a hidden layer with GELU before the classifier; None for none.
        eps: of the layer norms.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0 at the first.
    """

    depths: tuple[int, ...] = (3, 3, 9, 3)
    widths: tuple[int, ...] = (96, 192, 384, 768)
    kernel_size: int = 7
    stem: Literal["patch", "overlap", "tiered"] = "patch"
    patch_size: int = 4
    stem_norm: bool = True
    layer_scale: float | None = 1e-6
    conv_mlp: bool = False
    grn: bool = False
    norm_before_pool: bool = False
    head_width: int | None = None
    eps: float = 1e-6
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.widths):
            raise ValueError(f"depths and widths must be equally long: got {self.depths} and {self.widths}")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive: got {self.kernel_size}")
        if self.norm_before_pool and self.head_width:
            raise ValueError("head_width needs the norm after the pooling: leave norm_before_pool off")


class PointwiseMlp(nn.Module):
    """Expand four times, GELU, global response norm if wanted, project back."""

    def __init__(self, channels: int, *, conv: bool, grn: bool) -> None:
        super().__init__()
        layer = partial(nn.Conv2d, kernel_size=1) if conv else nn.Linear
        self.fc1 = layer(channels, 4 * channels)
        self.act = nn.GELU()
        self.grn = GlobalResponseNorm(4 * channels, channels_last=not conv) if grn else nn.Identity()
        self.fc2 = layer(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the channels of every pixel."""
        return self.fc2(self.grn(self.act(self.fc1(x))))


class ConvNeXtBlock(nn.Module):
    r"""Depthwise convolution, layer norm and a pointwise MLP on a residual branch.

    .. math:: y = x + \gamma \cdot W_2\, \mathrm{GELU}(W_1\, \mathrm{LN}(k * x))
    """

    def __init__(self, config: ConvNeXtConfig, channels: int, drop: float) -> None:
        super().__init__()
        kernel = config.kernel_size
        self.conv_dw = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels)
        norm = LayerNorm2d if config.conv_mlp else nn.LayerNorm
        self.norm = norm(channels, eps=config.eps)
        self.mlp = PointwiseMlp(channels, conv=config.conv_mlp, grn=config.grn)
        scale = config.layer_scale
        self.gamma = None if scale is None else nn.Parameter(torch.full((channels,), scale))
        self.drop_path = DropPath(drop)
        self.conv_mlp = config.conv_mlp

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y = self.conv_dw(x)
        if self.conv_mlp:
            y = self.mlp(self.norm(y))
        else:
            y = self.mlp(self.norm(y.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        if self.gamma is not None:
            y = y * self.gamma[:, None, None]
        return x + self.drop_path(y)


class ConvNeXtStage(nn.Module):
    """Blocks of one width, after a norm and a 2x2 convolution of stride 2 where the stage is not the first."""

    def __init__(self, config: ConvNeXtConfig, in_channels: int, stage: int, drops: list[float]) -> None:
        super().__init__()
        width = config.widths[stage]
        self.downsample = nn.Identity()
        if stage > 0:
            self.downsample = nn.Sequential(
                LayerNorm2d(in_channels, config.eps), nn.Conv2d(in_channels, width, 2, 2)
            )
        self.blocks = nn.Sequential(*(ConvNeXtBlock(config, width, drop) for drop in drops))

    def forward(self, x: Tensor) -> Tensor:
        """Return the stage's map."""
        return self.blocks(self.downsample(x))


class ConvNeXtHead(nn.Module):
    """Average pooling, layer norm, a hidden layer if wanted, and the classifier."""

    def __init__(self, config: ConvNeXtConfig, channels: int) -> None:
        super().__init__()
        self.norm = nn.Identity() if config.norm_before_pool else nn.LayerNorm(channels, eps=config.eps)
        self.pre_logits: nn.Module = nn.Identity()
        if config.head_width:
            layers: dict[str, nn.Module] = {"fc": nn.Linear(channels, config.head_width), "act": nn.GELU()}
            self.pre_logits = nn.Sequential(OrderedDict(layers))
        self.drop = nn.Dropout(config.drop_rate)
        self.fc: nn.Module = nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits of a map, or what enters the classifier if `pre_logits`."""
        x = self.drop(self.pre_logits(self.norm(x.mean((2, 3)))))
        return x if pre_logits else self.fc(x)


class ConvNeXt(Backbone):
    """Network of `A ConvNet for the 2020s <https://arxiv.org/abs/2201.03545>`_ and ConvNeXt V2.

    Args:
        config: which one.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.

    Shapes:
        - input: :math:`(N, C, H, W)`
        - output: :math:`(N, K)`
    """

    def __init__(self, config: ConvNeXtConfig, num_classes: int = 1000, in_chans: int = 3) -> None:
        super().__init__()
        self.config = config
        width = config.widths[0]
        if config.stem == "patch":
            reduction = config.patch_size
            layers: list[nn.Module] = [nn.Conv2d(in_chans, width, reduction, reduction)]
        else:
            reduction = 4
            # The public weights round half the width to a multiple of eight.
            first = width if config.stem == "overlap" else max(8, (width // 2 + 4) // 8 * 8)
            layers = [nn.Conv2d(in_chans, first, 3, 2, 1), nn.Conv2d(first, width, 3, 2, 1)]
        if config.stem_norm:
            layers.append(LayerNorm2d(width, config.eps))
        self.stem = nn.Sequential(*layers)

        drops = torch.linspace(0, config.drop_path_rate, sum(config.depths), device="cpu").tolist()
        self.feature_info = FeatureInfo()
        self.stages = nn.Sequential()
        for stage, (depth, out) in enumerate(zip(config.depths, config.widths, strict=True)):
            done = sum(config.depths[:stage])
            self.stages.append(ConvNeXtStage(config, width, stage, drops[done : done + depth]))
            width = out
            reduction *= 1 if stage == 0 else 2
            self.feature_info.append(Feature(num_chs=width, reduction=reduction, module=f"stages.{stage}"))

        self.num_features = width
        self.norm_pre = LayerNorm2d(width, config.eps) if config.norm_before_pool else nn.Identity()
        self.head = ConvNeXtHead(config, width)
        self.reset_classifier(num_classes)
        self.apply(_init_weights)

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new classifier for `num_classes` in place; 0 leaves none."""
        self.num_classes = num_classes
        features = self.config.head_width or self.num_features
        self.head.fc = nn.Linear(features, num_classes) if num_classes else nn.Identity()
        _init_weights(self.head.fc)

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.head.fc

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """Return every stage's feature map."""
        x = self.stem(x)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last feature map, normed if the norm stands before the pooling."""
        return self.norm_pre(self.forward_stages(x)[-1])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits of a feature map, or what enters the classifier if `pre_logits`."""
        return self.head(x, pre_logits)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_ATTO, _NANO, _TINY, _SMALL, _HUGE = (2, 2, 6, 2), (2, 2, 8, 2), (3, 3, 9, 3), (3, 3, 27, 3), (3, 4, 30, 3)


def _widths(first: int) -> tuple[int, ...]:
    return first, 2 * first, 4 * first, 8 * first


def _row(
    depths: tuple[int, ...], width: int, params: float, macs: float, size=224, source="", **more
) -> Variant:
    return Variant(
        ConvNeXt, ConvNeXtConfig(depths, _widths(width), **more), params, macs, size, source=source
    )


def _v2(
    depths: tuple[int, ...], width: int, params: float | None, macs: float | None, conv_mlp=False
) -> Variant:
    config = ConvNeXtConfig(depths, _widths(width), layer_scale=None, grn=True, conv_mlp=conv_mlp)
    return Variant(ConvNeXt, config, params, macs, source="" if params is None else _V2)


def _isotropic(depth: int, width: int, params: float | None, macs: float) -> Variant:
    config = ConvNeXtConfig((depth,), (width,), patch_size=16, stem_norm=False, layer_scale=None)
    return Variant(ConvNeXt, config, params, macs)


_TIMM = "timm's model cards"
_V2 = "ConvNeXt V2, https://arxiv.org/abs/2301.00808"
_conv = {"conv_mlp": True, "source": _TIMM}

VARIANTS = {
    "convnext_atto": _row(_ATTO, 40, 3.7e6, 0.55e9, **_conv),
    "convnext_atto_ols": _row(_ATTO, 40, 3.7e6, 0.58e9, stem="tiered", **_conv),
    "convnext_femto": _row(_ATTO, 48, 5.22e6, 0.79e9, **_conv),
    "convnext_femto_ols": _row(_ATTO, 48, 5.23e6, 0.82e9, stem="tiered", **_conv),
    "convnext_pico": _row(_ATTO, 64, 9.05e6, 1.37e9, **_conv),
    "convnext_pico_ols": _row(_ATTO, 64, 9.06e6, 1.43e9, stem="tiered", **_conv),
    "convnext_nano": _row(_NANO, 80, 15.59e6, 2.46e9, **_conv),
    "convnext_nano_ols": _row(_NANO, 80, 15.65e6, 2.65e9, stem="overlap", **_conv),
    "convnext_tiny": _row(_TINY, 96, 28_589_128, 4.47e9),
    "convnext_tiny_hnf": _row(_TINY, 96, 28.59e6, 4.47e9, norm_before_pool=True, **_conv),
    "convnext_small": _row(_SMALL, 96, 50_223_688, 8.7e9),
    "convnext_base": _row(_SMALL, 128, 88_591_464, 15.4e9),
    "convnext_large": _row(_SMALL, 192, 197_767_336, 34.4e9),
    "convnext_large_mlp": _row(_SMALL, 192, 200.13e6, 44.94e9, 256, head_width=1536, source=_TIMM),
    "convnext_xlarge": _row(_SMALL, 256, 350.2e6, 60.9e9),
    "convnext_xxlarge": _row(_HUGE, 384, 846.47e6, 198.09e9, 256, eps=1e-5, source=_TIMM),
    # Published as 22M: two digits, coarser than the 1% to which counts are held.
    "convnext_iso_small": _isotropic(18, 384, None, 4.3e9),
    "convnext_iso_base": _isotropic(18, 768, 87e6, 16.9e9),
    "convnext_iso_large": _isotropic(36, 1024, 306e6, 59.7e9),
    "convnextv2_atto": _v2(_ATTO, 40, 3.7e6, 0.55e9, conv_mlp=True),
    "convnextv2_femto": _v2(_ATTO, 48, 5.2e6, 0.78e9, conv_mlp=True),
    "convnextv2_pico": _v2(_ATTO, 64, 9.1e6, 1.37e9, conv_mlp=True),
    "convnextv2_nano": _v2(_NANO, 80, 15.6e6, 2.45e9, conv_mlp=True),
    "convnextv2_tiny": _v2(_TINY, 96, 28.6e6, 4.47e9),
    "convnextv2_small": _v2(_SMALL, 96, None, None),
    "convnextv2_base": _v2(_SMALL, 128, 88.7e6, 15.4e9),
    "convnextv2_large": _v2(_SMALL, 192, 198e6, 34.4e9),
    "convnextv2_huge": _v2(_SMALL, 352, 660e6, 115e9),
    "convnext_test": Variant(
        ConvNeXt, ConvNeXtConfig((1, 1, 2, 1), (8, 12, 16, 24), kernel_size=5, stem="tiered", conv_mlp=True), size=32
    ),
    "convnextv2_test": Variant(
        ConvNeXt,
        ConvNeXtConfig((1, 2), (16, 24), patch_size=2, layer_scale=None, grn=True, head_width=32),
        size=32,
    ),
}  # fmt: skip
