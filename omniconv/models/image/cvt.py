"""CvT: a vision transformer in three stages whose tokens, queries, keys and values come from convolutions.

Paper: Wu et al., CvT: Introducing Convolutions to Vision Transformers, https://arxiv.org/abs/2103.15808. There is no
table of positions, so that any size of image works with the same weights. Parameter names are those of the official
weights. As in their code, logits of the attention are divided by the root of all channels, not of one head's.
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.layers.drop_path import DropPath
from omniconv.models.backbone import Backbone, Feature, FeatureInfo, Variant

__all__ = ["ConvAttention", "CvT", "CvTConfig"]


@dataclass(frozen=True)
class CvTConfig:
    """What tells one CvT from another.

    Attributes:
        depths: blocks of each stage.
        widths: channels of each stage.
        num_heads: of each stage.
        patch_sizes: kernel of the convolution that makes each stage's tokens.
        patch_strides: its stride.
        patch_padding: its padding.
        kv_stride: stride of the convolutions for keys and values.
        class_token: whether a learned token in the last stage gathers what the classifier reads; otherwise it reads
            the mean of all tokens.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0 at the first of the last stage.
    """

    depths: tuple[int, ...] = (1, 2, 10)
    widths: tuple[int, ...] = (64, 192, 384)
    num_heads: tuple[int, ...] = (1, 3, 6)
    patch_sizes: tuple[int, ...] = (7, 3, 3)
    patch_strides: tuple[int, ...] = (4, 2, 2)
    patch_padding: tuple[int, ...] = (2, 1, 1)
    kv_stride: int = 2
    class_token: bool = True
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        fields = (self.widths, self.num_heads, self.patch_sizes, self.patch_strides, self.patch_padding)
        if any(len(field) != len(self.depths) for field in fields):
            raise ValueError("depths, widths, num_heads and the patches' fields must be equally long")
        if any(width % heads for width, heads in zip(self.widths, self.num_heads, strict=True)):
            raise ValueError(f"num_heads must divide widths: got {self.num_heads} and {self.widths}")


def _map(tokens: Tensor, height: int, width: int) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, (height, width))


class ConvAttention(nn.Module):
    r"""Multi-head attention whose queries, keys and values are depthwise 3x3 convolutions of the map.

    .. math:: q = W_q\, \mathrm{BN}(d_q * x), \quad k = W_k\, \mathrm{BN}(d_k * x), \quad
        v = W_v\, \mathrm{BN}(d_v * x), \quad y = W_o\, \mathrm{softmax}(q k^T / \sqrt{C})\, v

    With a stride of 2 there are a quarter as many keys and values. A class token passes the convolutions by.

    Args:
        channels: C.
        num_heads: heads.
        kv_stride: stride of the convolutions for keys and values.
    """

    def __init__(self, channels: int, num_heads: int, kv_stride: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.conv_proj_q, self.conv_proj_k, self.conv_proj_v = (
            nn.Sequential(
                OrderedDict(
                    conv=nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False),
                    bn=nn.BatchNorm2d(channels),
                )
            )
            for stride in (1, kv_stride, kv_stride)
        )
        self.proj_q, self.proj_k, self.proj_v, self.proj = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Mix tokens (N, P + H W, C), of which the last H W are a map."""
        split = x.shape[1] - height * width
        token, fmap = x[:, :split], _map(x[:, split:], height, width)
        q, k, v = (
            linear(torch.cat([token, conv(fmap).flatten(2).transpose(1, 2)], 1))
            .unflatten(2, (self.num_heads, -1))
            .transpose(1, 2)
            for conv, linear in (
                (self.conv_proj_q, self.proj_q),
                (self.conv_proj_k, self.proj_k),
                (self.conv_proj_v, self.proj_v),
            )
        )
        y = F.scaled_dot_product_attention(q, k, v, scale=x.shape[2] ** -0.5)
        return self.proj(y.transpose(1, 2).flatten(2))


class QuickGELU(nn.Module):
    """The approximation x sigmoid(1.702 x) of GELU."""

    def forward(self, x: Tensor) -> Tensor:
        """Activate `x`."""
        return x * torch.sigmoid(1.702 * x)


class CvTBlock(nn.Module):
    """Attention and an MLP, each after a layer norm and on a residual branch."""

    def __init__(self, channels: int, num_heads: int, kv_stride: int, drop: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn = ConvAttention(channels, num_heads, kv_stride)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(
            OrderedDict(
                fc1=nn.Linear(channels, 4 * channels), act=QuickGELU(), fc2=nn.Linear(4 * channels, channels)
            )
        )
        self.drop_path = DropPath(drop)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Return the block's tokens."""
        x = x + self.drop_path(self.attn(self.norm1(x), height, width))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ConvEmbed(nn.Module):
    """Convolutional token embedding: a strided convolution whose every pixel, normed, is a token."""

    def __init__(self, in_channels: int, channels: int, kernel: int, stride: int, padding: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, channels, kernel, stride, padding)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return the map of tokens, (N, H, W, C)."""
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class CvTStage(nn.Module):
    """Token embedding and blocks."""

    def __init__(self, config: CvTConfig, in_channels: int, stage: int) -> None:
        super().__init__()
        width, last = config.widths[stage], stage == len(config.widths) - 1
        self.patch_embed = ConvEmbed(
            in_channels,
            width,
            config.patch_sizes[stage],
            config.patch_strides[stage],
            config.patch_padding[stage],
        )
        self.cls_token = nn.Parameter(torch.empty(1, 1, width)) if last and config.class_token else None
        depth, rate = config.depths[stage], config.drop_path_rate if last else 0.0
        self.blocks = nn.ModuleList(
            CvTBlock(width, config.num_heads[stage], config.kv_stride, drop)
            for drop in torch.linspace(0, rate, depth, device="cpu").tolist()
        )
        # Nothing but a place where the tokens are a map, for hooks.
        self.map = nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the map (N, C, H, W) and the class token, (N, 1, C) or, where there is none, (N, 0, C)."""
        x = self.patch_embed(x)
        batch, height, width, _ = x.shape
        x = x.flatten(1, 2)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(batch, -1, -1), x], 1)
        for block in self.blocks:
            x = block(x, height, width)
        split = x.shape[1] - height * width
        return self.map(_map(x[:, split:], height, width)), x[:, :split]


class CvT(Backbone):
    """Network of `CvT <https://arxiv.org/abs/2103.15808>`_.

    `forward_features` gives the normed tokens of the last stage as (N, C, P + H W), the class token first. The last
    feature map are its other tokens; logits of a network with class token do not depend on their last form.

    Args:
        config: which one.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.

    Shapes:
        - input: :math:`(N, C, H, W)`
        - output: :math:`(N, K)`
    """

    def __init__(self, config: CvTConfig, num_classes: int = 1000, in_chans: int = 3) -> None:
        super().__init__()
        self.config = config
        self.feature_info = FeatureInfo()
        self.stage_names = [f"stage{stage}" for stage in range(len(config.depths))]
        channels, reduction = in_chans, 1
        for stage, name in enumerate(self.stage_names):
            self.add_module(name, CvTStage(config, channels, stage))
            channels = config.widths[stage]
            reduction *= config.patch_strides[stage]
            self.feature_info.append(Feature(num_chs=channels, reduction=reduction, module=f"{name}.map"))
        self.num_features = channels
        self.norm = nn.LayerNorm(channels)
        self.drop = nn.Dropout(config.drop_rate)
        self.reset_classifier(num_classes)
        self.apply(_init_weights)

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new classifier for `num_classes` in place; 0 leaves none."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        _init_weights(self.head)

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.head

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """Return every stage's feature map."""
        maps = []
        for name in self.stage_names:
            x, _ = self.get_submodule(name)(x)
            maps.append(x)
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """Return all normed tokens (N, C, P + H W) of the last stage."""
        token = x
        for name in self.stage_names:
            x, token = self.get_submodule(name)(x)
        return self.norm(torch.cat([token, x.flatten(2).transpose(1, 2)], 1)).transpose(1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits of the tokens (N, C, P + H W), or what enters the classifier if `pre_logits`."""
        x = self.drop(x[:, :, 0] if self.config.class_token else x.mean(2))
        return x if pre_logits else self.head(x)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, CvTStage) and module.cls_token is not None:
        nn.init.trunc_normal_(module.cls_token, std=0.02)


_13 = CvTConfig()
_21 = CvTConfig((1, 4, 16))
_W24 = CvTConfig((2, 2, 20), (192, 768, 1024), (3, 12, 16))

VARIANTS = {
    "cvt_13": Variant(CvT, _13, 20e6, 4.5e9),
    "cvt_13_384": Variant(CvT, _13, 20e6, 16.3e9, size=384),
    "cvt_21": Variant(CvT, _21, 32e6, 7.1e9),
    "cvt_21_384": Variant(CvT, _21, 32e6, 24.9e9, size=384),
    "cvt_w24_384": Variant(CvT, _W24, 277e6, 193.2e9, size=384),
    "cvt_test": Variant(
        CvT,
        CvTConfig((1, 1), (8, 12), (1, 3), (7, 3), (4, 2), (2, 1), drop_path_rate=0.1),
        size=32,
    ),
}
