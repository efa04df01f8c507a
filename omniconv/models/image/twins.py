"""Twins: attention within windows in turn with attention to a subsampled map, positions from a convolution.

Paper: Chu et al., https://arxiv.org/abs/2104.13840. Twins-SVT has both attentions, Twins-PCPVT the subsampled one
alone. Parameter names are those of the public weights. Maps are padded with zeros where patches, windows or the
subsampling do not fit, so that images of any size work.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.layers.attention.polyphase_anchor import AnchoredConv2d, polyphase_anchor, roll_each
from omniconv.layers.attention.self_attention import SelfAttention
from omniconv.layers.conv.patch import PatchConv2d
from omniconv.models.backbone import Backbone, Feature, FeatureInfo, Variant
from omniconv.models.image.vit import Block, PatchEmbed, PositionalConv, init_weights

__all__ = ["SubsampledAttention", "Twins", "TwinsConfig", "WindowAttention"]


@dataclass(frozen=True)
class TwinsConfig:
    """What tells one Twins from another.

    Attributes:
        depths: blocks a stage.
        widths: features of a token in each stage.
        num_heads: heads in each stage.
        mlp_ratios: hidden features of each stage's MLPs, in units of its width.
        subsampling: pixels along a side of the patch that becomes one key, in each stage.
        window: tokens along a side of the windows to which every other attention keeps, from the first on; None
            for none such.
        patch_size: pixels along a side of the first patches; later ones are 2.
        anchored: patches, windows and keys follow the image (polyphase anchoring) and borders are circular, so that
            circular shifts change no answer; the weights are the same.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0 at the first.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    num_heads: tuple[int, ...]
    mlp_ratios: tuple[int, ...] = (4, 4, 4, 4)
    subsampling: tuple[int, ...] = (8, 4, 2, 1)
    window: int | None = None
    patch_size: int = 4
    anchored: bool = False
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        names = ("depths", "widths", "num_heads", "mlp_ratios", "subsampling")
        lengths = {name: len(getattr(self, name)) for name in names}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"every stage needs one number of each: got {lengths}")


class WindowAttention(SelfAttention):
    """Self-attention within windows of a map (N, H, W, C), which is padded with zeros to whole ones."""

    def __init__(self, dim: int, num_heads: int, window: int, anchored: bool = False) -> None:
        super().__init__(dim, num_heads)
        self.window, self.anchored = window, anchored

    def forward(self, x: Tensor) -> Tensor:
        """Let the tokens of every window attend to each other."""
        batch, height, width, channels = x.shape
        side = self.window
        down, across = (height + side - 1) // side, (width + side - 1) // side
        shift = None
        if self.anchored:
            x, shift = polyphase_anchor(x.permute(0, 3, 1, 2), side)
            x = x.permute(0, 2, 3, 1)
        elif torch.compiler.is_compiling() or height % side or width % side:
            x = F.pad(x, (0, 0, 0, side - 1, 0, side - 1))
        windows = x.unfold(1, side, side).unfold(2, side, side).permute(0, 1, 2, 4, 5, 3)
        y = super().forward(_copy(windows).view(-1, side * side, channels))
        y = _copy(y.view(batch, down, across, side, side, channels).transpose(2, 3))
        y = y.view(batch, down * side, across * side, channels)
        if shift is not None:
            y = roll_each(y.permute(0, 3, 1, 2), -shift).permute(0, 2, 3, 1)
        return _first(_first(y, 1, height), 2, width)


# Compiled programs ask for the strides of a part of a map and hold only for these; a copy's are known.


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _first(x: Tensor, axis: int, count: int) -> Tensor:
    if not torch.compiler.is_compiling() and x.shape[axis] == count:
        return x
    return x.index_select(axis, torch.arange(count, device=x.device))


class SubsampledAttention(nn.Module):
    """Attention of every token of a map (N, H, W, C) to the keys of a map that is `ratio` times smaller."""

    def __init__(self, dim: int, num_heads: int, ratio: int, anchored: bool = False) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be divisible by num_heads: got {dim} and {num_heads}")
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        patch = AnchoredConv2d if anchored else PatchConv2d
        self.sr = patch(dim, dim, ratio) if ratio > 1 else None
        self.norm = nn.LayerNorm(dim) if ratio > 1 else None

    def subsample(self, x: Tensor) -> Tensor:
        """Return the smaller map (N, H / ratio, W / ratio, C)."""
        if self.sr is None or self.norm is None:
            return x
        return self.norm(self.sr(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Let the tokens of `x` attend to the subsampled ones."""
        q = self.q(x).flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        kv = self.kv(self.subsample(x)).flatten(1, 2).unflatten(-1, (2, self.num_heads, -1))
        k, v = kv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2)).unflatten(1, x.shape[1:3])


class NormedPatchEmbed(PatchEmbed):
    """A linear map of every patch, and a layer norm."""

    def __init__(self, in_chans: int, dim: int, patch_size: int, anchored: bool) -> None:
        super().__init__(in_chans, dim, patch_size, anchored)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens (N, H / p, W / p, D) of a map (N, C, H, W)."""
        return self.norm(super().forward(x))


class Twins(Backbone):
    """Network of `Twins <https://arxiv.org/abs/2104.13840>`_.

    Args:
        config: which one.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.

    Shapes:
        - input: :math:`(N, C, H, W)`
        - output: :math:`(N, K)`
    """

    def __init__(self, config: TwinsConfig, num_classes: int = 1000, in_chans: int = 3) -> None:
        super().__init__()
        self.config = config
        self.num_features = config.widths[-1]
        drops = iter(torch.linspace(0, config.drop_path_rate, sum(config.depths), device="cpu").tolist())
        self.patch_embeds, self.blocks = nn.ModuleList(), nn.ModuleList()
        self.feature_info = FeatureInfo()
        channels, reduction = in_chans, 1
        for stage, (depth, dim) in enumerate(zip(config.depths, config.widths, strict=True)):
            side = 2 if stage else config.patch_size
            self.patch_embeds.append(NormedPatchEmbed(channels, dim, side, config.anchored))
            self.blocks.append(
                nn.ModuleList(
                    Block(
                        self.make_attention(stage, index), dim, config.mlp_ratios[stage] * dim,
                        layer_scale=None, drop=next(drops), eps=1e-6,
                    )
                    for index in range(depth)
                )
            )  # fmt: skip
            channels, reduction = dim, reduction * side
            self.feature_info.append(Feature(num_chs=dim, reduction=reduction, module=f"maps.{stage}"))
        self.pos_block = nn.ModuleList(PositionalConv(dim, config.anchored) for dim in config.widths)
        # Nothing but places where the tokens are a map, for hooks.
        self.maps = nn.ModuleList(nn.Identity() for _ in config.widths)
        self.norm = nn.LayerNorm(self.num_features, 1e-6)
        self.drop = nn.Dropout(config.drop_rate)
        self.reset_classifier(num_classes)
        self.apply(_init_weights)

    def make_attention(self, stage: int, index: int) -> nn.Module:
        """Return the attention of a stage's block."""
        config = self.config
        dim, heads = config.widths[stage], config.num_heads[stage]
        if config.window and index % 2 == 0:
            return WindowAttention(dim, heads, config.window, config.anchored)
        return SubsampledAttention(dim, heads, config.subsampling[stage], config.anchored)

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new classifier for `num_classes` in place; 0 leaves none."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        init_weights(self.head)

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.head

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """Return every stage's feature map."""
        maps = []
        for embed, blocks, position, keep in zip(
            self.patch_embeds, self.blocks, self.pos_block, self.maps, strict=True
        ):
            x = embed(x)
            for index, block in enumerate(blocks.children()):
                x = block(x)
                if index == 0:
                    x = position(x)
            x = keep(x.permute(0, 3, 1, 2))
            maps.append(x)
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last feature map, normed."""
        return self.norm(self.forward_stages(x)[-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits of a feature map, or what enters the classifier if `pre_logits`."""
        x = self.drop(x.mean((2, 3)))
        return x if pre_logits else self.head(x)


def _init_weights(module: nn.Module) -> None:
    init_weights(module)
    if isinstance(module, nn.Conv2d):
        outputs = module.weight[0, 0].numel() * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / outputs))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _pcpvt(depths: tuple[int, ...], params: float, macs: float) -> Variant:
    config = TwinsConfig(depths, (64, 128, 320, 512), (1, 2, 5, 8), (8, 8, 4, 4))
    return Variant(Twins, config, params, macs)


def _svt(depths: tuple[int, ...], width: int, params: float, macs: float) -> Variant:
    widths = tuple(width * 2**stage for stage in range(4))
    return Variant(Twins, TwinsConfig(depths, widths, tuple(w // 32 for w in widths), window=7), params, macs)


VARIANTS = {
    "twins_pcpvt_small": _pcpvt((3, 4, 6, 3), 24.1e6, 3.8e9),
    "twins_pcpvt_base": _pcpvt((3, 4, 18, 3), 43.8e6, 6.7e9),
    "twins_pcpvt_large": _pcpvt((3, 8, 27, 3), 60.9e6, 9.8e9),
    "twins_svt_small": _svt((2, 2, 10, 4), 64, 24e6, 2.9e9),
    "twins_svt_base": _svt((2, 2, 18, 2), 96, 56e6, 8.6e9),
    "twins_svt_large": _svt((2, 2, 18, 2), 128, 99.2e6, 15.1e9),
    "twins_test": Variant(
        Twins, TwinsConfig((2, 2), (16, 32), (2, 4), (2, 2), (2, 1), window=3, drop_path_rate=0.1), size=32
    ),
}
