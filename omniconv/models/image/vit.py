"""Vision transformers: ViT, DeiT with and without distillation token, DeiT III.

Papers: Dosovitskiy et al., An Image is Worth 16x16 Words, https://arxiv.org/abs/2010.11929; Touvron et al., Training
data-efficient image transformers, https://arxiv.org/abs/2012.12877; DeiT III, https://arxiv.org/abs/2204.07118, which
scales residual branches and gives the class token no position. Parameter names are those of the public weights (timm's
form), but for the distillation token's classifier, `head.dist`; public weights with `head_dist` load as they are.
Positions are resampled for images of other sizes, which are padded with zeros to whole patches.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omniconv.layers.attention.polyphase_anchor import AnchoredConv2d
from omniconv.layers.attention.self_attention import SelfAttention
from omniconv.layers.conv.patch import PatchConv2d
from omniconv.layers.drop_path import DropPath
from omniconv.models.backbone import Backbone, Feature, FeatureInfo, Variant
from omniconv.models.weights import Rules

__all__ = [
    "Block",
    "Mlp",
    "PatchEmbed",
    "PositionalConv",
    "ViTConfig",
    "VisionTransformer",
    "init_weights",
    "resample_positions",
]

OFFICIAL_NAMES: Rules = ((r"^head_dist\.", "head.dist."),)


@dataclass(frozen=True)
class ViTConfig:
    """What tells one vision transformer from another.

    Attributes:
        dim: features of a token.
        depth: blocks.
        num_heads: heads of every attention.
        patch_size: pixels along a side of a patch.
        img_size: pixels along a side of the images for which positions are learned.
        mlp_ratio: hidden features of the MLPs, in units of `dim`.
        qkv_bias: queries, keys and values have a bias.
        class_token: a learned token gathers what the classifier reads; without it that is the mean of all tokens.
        distilled: a second such token with a classifier of its own (DeiT); the answer is the mean of both.
        prefix_positions: learn positions for these tokens too.
        layer_scale: initial scale of every residual branch; None for no scale.
        anchored: patches follow the image (polyphase anchoring) and positions come from a circular convolution, so that
            circular shifts change no answer.
        eps: of the layer norms.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0 at the first.
    """

    dim: int = 768
    depth: int = 12
    num_heads: int = 12
    patch_size: int = 16
    img_size: int = 224
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    class_token: bool = True
    distilled: bool = False
    prefix_positions: bool = True
    layer_scale: float | None = None
    anchored: bool = False
    eps: float = 1e-6
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        if self.distilled and not self.class_token:
            raise ValueError("distilled needs the class token: leave class_token on")

    @property
    def grid(self) -> int:
        """Patches along a side of an image of `img_size`."""
        return -(-self.img_size // self.patch_size)


class PatchEmbed(nn.Module):
    """A linear map of every patch: images (N, C, H, W) become tokens (N, H / p, W / p, D)."""

    def __init__(self, in_chans: int, dim: int, patch_size: int, anchored: bool = False) -> None:
        super().__init__()
        self.proj = (AnchoredConv2d if anchored else PatchConv2d)(in_chans, dim, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens of `x`."""
        return self.proj(x).permute(0, 2, 3, 1)


class Mlp(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the features of every token."""
        return self.fc2(self.act(self.fc1(x)))


class PositionalConv(nn.Module):
    """Adds to every token of a map (N, H, W, D) what a depthwise convolution makes of its neighbours.

    Paper: Chu et al., Conditional Positional Encodings, https://arxiv.org/abs/2102.10882. Zeros beyond the border tell
    tokens where they are; a `circular` border does not, and all tokens are alike.
    """

    def __init__(self, dim: int, circular: bool) -> None:
        super().__init__()
        mode = "circular" if circular else "zeros"
        self.proj = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, groups=dim, padding_mode=mode))

    def forward(self, x: Tensor) -> Tensor:
        """Return the map of tokens that know their neighbours."""
        return x + self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class LayerScale(nn.Module):
    """A learned factor for every feature."""

    def __init__(self, dim: int, value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), value))

    def forward(self, x: Tensor) -> Tensor:
        """Scale `x`."""
        return x * self.gamma


class Block(nn.Module):
    r"""Attention and MLP, each on a residual branch after a layer norm.

    .. math:: z = x + \mathrm{Attention}(\mathrm{LN}(x)), \qquad y = z + \mathrm{MLP}(\mathrm{LN}(z))

    Args:
        attn: maps tokens (..., D) to tokens (..., D).
        dim: D.
        hidden: features between the MLP's layers.
        layer_scale: initial scale of both branches; None for no scale.
        drop: stochastic depth.
        eps: of the layer norms.
    """

    def __init__(
        self, attn: nn.Module, dim: int, hidden: int, *, layer_scale: float | None, drop: float, eps: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps)
        self.attn = attn
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps)
        self.mlp = Mlp(dim, hidden)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path = DropPath(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's tokens."""
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class DistilledHead(nn.Linear):
    """The mean of two classifiers: this one reads the class token, `dist` the distillation token beside it."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__(dim, classes)
        self.dist = nn.Linear(dim, classes)

    def forward(self, input: Tensor) -> Tensor:
        """Return logits (N, classes) of both tokens (N, 2 D)."""
        token, distilled = input.chunk(2, -1)
        return (super().forward(token) + self.dist(distilled)) / 2


class VisionTransformer(Backbone):
    """Network of `An Image is Worth 16x16 Words <https://arxiv.org/abs/2010.11929>`_, DeiT and DeiT III.

    `forward_features` gives the tokens behind the last norm as (N, D, P + H W), the P class and distillation tokens
    first. The feature maps are the patches' tokens after each of the last three blocks; logits of a network with class
    token do not depend on the last of them.

    Args:
        config: which one.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.

    Shapes:
        - input: :math:`(N, C, H, W)`
        - output: :math:`(N, K)`
    """

    def __init__(self, config: ViTConfig, num_classes: int = 1000, in_chans: int = 3) -> None:
        super().__init__()
        self.config = config
        self.num_features = dim = config.dim
        self.prefix_tokens = int(config.class_token) + int(config.distilled)
        self.patch_embed = PatchEmbed(in_chans, dim, config.patch_size, config.anchored)
        self.pos_conv = PositionalConv(dim, circular=True) if config.anchored else None
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim)) if config.class_token else None
        self.dist_token = nn.Parameter(torch.empty(1, 1, dim)) if config.distilled else None
        places = config.grid**2 + self.prefix_tokens * config.prefix_positions
        self.pos_embed = None if config.anchored else nn.Parameter(torch.empty(1, places, dim))

        drops = torch.linspace(0, config.drop_path_rate, config.depth, device="cpu").tolist()
        self.blocks = nn.Sequential(
            *(
                Block(
                    self.make_attention(index), dim, int(config.mlp_ratio * dim),
                    layer_scale=config.layer_scale, drop=drop, eps=config.eps,
                )
                for index, drop in enumerate(drops)
            )
        )  # fmt: skip
        # Nothing but places where the tokens are a map, for hooks.
        self.maps = nn.ModuleList(nn.Identity() for _ in drops[-3:])
        self.feature_info = FeatureInfo(
            Feature(num_chs=dim, reduction=config.patch_size, module=f"maps.{index}")
            for index in range(len(self.maps))
        )
        self.norm = nn.LayerNorm(dim, config.eps)
        self.drop = nn.Dropout(config.drop_rate)
        self.reset_classifier(num_classes)
        self.apply(init_weights)
        for token in (self.cls_token, self.dist_token, self.pos_embed):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)
        self.register_load_state_dict_pre_hook(_accept_official_names)

    def make_attention(self, index: int) -> nn.Module:
        """Return the attention of a block."""
        return SelfAttention(self.config.dim, self.config.num_heads, self.config.qkv_bias)

    @property
    def join(self) -> int:
        """The block before which class and distillation tokens join the patches'; until there, tokens are maps."""
        return 0

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new classifier for `num_classes` in place; 0 leaves none."""
        self.num_classes = num_classes
        kind = DistilledHead if self.config.distilled else nn.Linear
        self.head = kind(self.num_features, num_classes) if num_classes else nn.Identity()
        self.head.apply(init_weights)

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.head

    def embed(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return the prefix tokens (1, P, D), None if there are none, and the patches' (N, H, W, D), with positions."""
        tokens: list[Tensor] = [token for token in (self.cls_token, self.dist_token) if token is not None]
        prefix = torch.cat(tokens, 1) if tokens else None
        x = self.patch_embed(x)
        if self.pos_conv is not None:
            return prefix, self.pos_conv(x)
        assert self.pos_embed is not None
        count = self.prefix_tokens * self.config.prefix_positions
        if prefix is not None and count:
            prefix = prefix + self.pos_embed[:, :count]
        grid = (self.config.grid, self.config.grid)
        return prefix, x + resample_positions(self.pos_embed[:, count:].unflatten(1, grid), *x.shape[1:3])

    def forward_tokens(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the tokens (N, P + H W, D) after the last block, prefix first, and the maps of the last blocks."""
        prefix, x = self.embed(x)
        height, width = x.shape[1:3]
        count = 0
        maps: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            if index == self.join:
                x = x.flatten(1, 2)
                if prefix is not None:
                    x = torch.cat([prefix.expand(x.shape[0], -1, -1), x], 1)
                    count = self.prefix_tokens
            x = block(x)
            left = len(self.blocks) - index
            if left > len(self.maps):
                continue
            patches = x[:, count:].unflatten(1, (height, width)) if x.ndim == 3 else x
            maps.append(self.maps[-left](patches.permute(0, 3, 1, 2)))
            # What follows reads the map, so that its gradient can be asked for.
            patches = maps[-1].permute(0, 2, 3, 1)
            x = torch.cat([x[:, :count], patches.flatten(1, 2)], 1) if x.ndim == 3 else patches
        return x, maps

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """Return the maps of the last blocks."""
        return self.forward_tokens(x)[1]

    def forward_features(self, x: Tensor) -> Tensor:
        """Return all normed tokens (N, D, P + H W) of images (N, C, H, W)."""
        return self.norm(self.forward_tokens(x)[0]).transpose(1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits of tokens (N, D, P + H W), or what enters the classifier if `pre_logits`."""
        count = self.prefix_tokens
        x = self.drop(x[:, :, :count].transpose(1, 2).flatten(1) if count else x.mean(2))
        return x if pre_logits else self.head(x)


def resample_positions(places: Tensor, height: int, width: int) -> Tensor:
    """Return embeddings (1, H, W, D) of a grid of places for another, by bicubic interpolation with antialiasing.

    Written as two matrix products, since torch cannot compile the gradient of `F.interpolate` with antialiasing.
    """
    if (height, width) == places.shape[1:3]:
        return places
    wide = places.to(torch.promote_types(places.dtype, torch.float32))
    rows, columns = (
        _cubic_weights(old, new, wide) for old, new in zip(places.shape[1:3], (height, width), strict=True)
    )
    return torch.einsum("yi,xj,nijd->nyxd", rows, columns, wide).to(places.dtype)


def _cubic_weights(old: int, new: int, like: Tensor) -> Tensor:
    """Return what each of `old` points counts for each of `new` ones: a cubic that widens where points get fewer."""
    before, after = (torch.arange(n, device=like.device, dtype=like.dtype) + 0.5 for n in (old, new))
    scale = old / new
    d = (before - after[:, None] * scale).abs() / torch.sym_max(scale, 1.0)
    near = (1.5 * d - 2.5) * d**2 + 1
    far = ((-0.5 * d + 2.5) * d - 4) * d + 2
    weights = torch.where(d < 1, near, torch.where(d < 2, far, 0))
    return weights / weights.sum(1, keepdim=True)


def init_weights(module: nn.Module) -> None:
    """Draw a linear layer's weights from a truncated normal distribution of deviation 0.02; no bias."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _accept_official_names(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    old, new = f"{prefix}head_dist.", f"{prefix}head.dist."
    for name in [name for name in state if name.startswith(old)]:
        state[new + name.removeprefix(old)] = state.pop(name)


_TINY: Mapping[str, Any] = {"dim": 192, "num_heads": 3}
_SMALL: Mapping[str, Any] = {"dim": 384, "num_heads": 6}
_MEDIUM: Mapping[str, Any] = {"dim": 512, "num_heads": 8}
_LARGE: Mapping[str, Any] = {"dim": 1024, "depth": 24, "num_heads": 16}
_HUGE: Mapping[str, Any] = {"dim": 1280, "depth": 32, "num_heads": 16, "patch_size": 14}
_DEIT3: Mapping[str, Any] = {"prefix_positions": False, "layer_scale": 1e-4}
_TIMM = "timm's model cards"


def _row(params: float, macs: float, source: str = "", **config: Any) -> Variant:
    return Variant(VisionTransformer, ViTConfig(**config), params, macs, source=source)


VARIANTS = {
    "vit_tiny_patch16_224": _row(5.72e6, 1.26e9, source=_TIMM, **_TINY),
    "vit_small_patch16_224": _row(22.05e6, 4.61e9, source=_TIMM, **_SMALL),
    "vit_small_patch32_224": _row(22.88e6, 1.15e9, source=_TIMM, patch_size=32, **_SMALL),
    "vit_base_patch16_224": _row(86.57e6, 17.58e9, source=_TIMM),
    "vit_base_patch32_224": _row(88.22e6, 4.41e9, source=_TIMM, patch_size=32),
    "vit_large_patch16_224": _row(304.33e6, 61.6e9, source=_TIMM, **_LARGE),
    "vit_large_patch32_224": _row(306.54e6, 15.39e9, source=_TIMM, patch_size=32, **_LARGE),
    "deit_tiny_patch16_224": _row(5.72e6, 1.26e9, source=_TIMM, **_TINY),
    "deit_small_patch16_224": _row(22.05e6, 4.61e9, source=_TIMM, **_SMALL),
    "deit_base_patch16_224": _row(86.57e6, 17.58e9, source=_TIMM),
    "deit_tiny_distilled_patch16_224": _row(5.91e6, 1.27e9, source=_TIMM, distilled=True, **_TINY),
    "deit_small_distilled_patch16_224": _row(22.44e6, 4.63e9, source=_TIMM, distilled=True, **_SMALL),
    "deit_base_distilled_patch16_224": _row(87.34e6, 17.68e9, source=_TIMM, distilled=True),
    "deit3_small_patch16_224": _row(22.0e6, 4.6e9, **_SMALL, **_DEIT3),
    "deit3_medium_patch16_224": _row(38.85e6, 8.0e9, source=_TIMM, **_MEDIUM, **_DEIT3),
    "deit3_base_patch16_224": _row(86.6e6, 17.5e9, **_DEIT3),
    "deit3_large_patch16_224": _row(304.4e6, 61.6e9, **_LARGE, **_DEIT3),
    "deit3_huge_patch14_224": _row(632.1e6, 167.4e9, **_HUGE, **_DEIT3),
    "vit_test": Variant(
        VisionTransformer,
        ViTConfig(32, 2, 4, 4, 32, class_token=False, layer_scale=0.1, prefix_positions=False, drop_path_rate=0.1),
        size=32,
    ),
    "deit_test": Variant(VisionTransformer, ViTConfig(32, 2, 4, 8, 48, distilled=True), size=48),
}  # fmt: skip
