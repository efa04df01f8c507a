"""HaloNet: bottleneck networks whose 3x3 convolutions are halo attention, everywhere or in the late stages.

Paper: Vaswani et al., Scaling Local Self-Attention for Parameter Efficient Visual Backbones,
https://arxiv.org/abs/2103.12731. H0 to H7 are the paper's table; the hybrids (halonet26t, halonet50ts,
sehalonet33ts) are those of the public weights, whose parameter names these are. Any size of image works: halo
attention fills up the blocks at the border.
"""

from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from omniconv.layers.attention.halo import HaloAttention
from omniconv.layers.attention.se import SqueezeExcite
from omniconv.layers.drop_path import DropPath
from omniconv.models.backbone import Backbone, Feature, FeatureInfo, Variant

__all__ = ["HaloBlock", "HaloNet", "HaloNetConfig"]


@dataclass(frozen=True)
class HaloNetConfig:
    """What tells one HaloNet from another.

    Attributes:
        stages: the blocks of each stage, a letter each: "a" with attention, "c" with a 3x3 convolution.
        widths: channels of each stage's output.
        inner: channels of each stage's queries, keys and 3x3 convolutions.
        num_heads: of each stage.
        value_ratio: channels of the values over those of the queries (the paper's r_v).
        block_size: pixels along a side of a block.
        halo_size: pixels around it.
        stem: a 7x7 convolution, or three 3x3 of rising widths ("tiered").
        stem_pool: whether max pooling follows the stem; otherwise its last convolution has stride 2.
        act: activation.
        gate: squeeze-and-excitation in the blocks with convolution.
        final_width: channels of a 1x1 convolution after the last stage; None for none.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0 at the first.
    """

    stages: tuple[str, ...] = ("aaa", "aaa", "aaaaaaaaaa", "aaa")
    widths: tuple[int, ...] = (64, 128, 256, 512)
    inner: tuple[int, ...] = (64, 128, 256, 512)
    num_heads: tuple[int, ...] = (8, 8, 8, 8)
    value_ratio: float = 1.0
    block_size: int = 8
    halo_size: int = 3
    stem: Literal["7x7", "tiered"] = "7x7"
    stem_pool: bool = True
    act: Literal["relu", "silu"] = "relu"
    gate: bool = False
    final_width: int | None = None
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        if not len(self.stages) == len(self.widths) == len(self.inner) == len(self.num_heads):
            raise ValueError("stages, widths, inner and num_heads must be equally long")
        if set("".join(self.stages)) - {"a", "c"}:
            raise ValueError(f"stages must hold the letters a and c: got {self.stages}")

    def make_act(self) -> nn.Module:
        """Return the activation."""
        return nn.SiLU(inplace=True) if self.act == "silu" else nn.ReLU(inplace=True)


class ConvNormAct(nn.Sequential):
    """A convolution, batch norm and, where `act` is given, an activation."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        act: nn.Module | None = None,
    ) -> None:
        layers: dict[str, nn.Module] = {
            "conv": nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False),
            "bn": nn.BatchNorm2d(out_channels),
        }
        if act is not None:
            layers["act"] = act
        super().__init__(OrderedDict(layers))


class HaloBlock(nn.Module):
    """1x1, then attention or a 3x3 convolution, then 1x1, and a shortcut; the middle carries the stride."""

    def __init__(
        self, config: HaloNetConfig, in_channels: int, stage: int, *, attend: bool, stride: int, drop: float
    ) -> None:
        super().__init__()
        inner, width, act = config.inner[stage], config.widths[stage], config.make_act
        self.shortcut = nn.Identity()
        if in_channels != width or stride != 1:
            self.shortcut = ConvNormAct(in_channels, width, stride=stride)
        self.conv1_1x1 = ConvNormAct(in_channels, inner, act=act())
        if attend:
            values = int(inner * config.value_ratio)
            self.self_attn = HaloAttention(
                inner,
                values,
                num_heads=config.num_heads[stage],
                head_dim=inner // config.num_heads[stage],
                block_size=config.block_size,
                halo_size=config.halo_size,
                stride=stride,
                query_step=1,
            )
            self.post_attn = nn.BatchNorm2d(values)
            self.post_act = act()
            self.conv3_1x1 = ConvNormAct(values, width)
        else:
            self.conv2_kxk = ConvNormAct(inner, inner, 3, stride, act())
            self.attn = SqueezeExcite(inner) if config.gate else nn.Identity()
            self.conv3_1x1 = ConvNormAct(inner, width)
        self.drop_path = DropPath(drop)
        self.act = act()
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y = self.conv1_1x1(x)
        if self.attend:
            y = self.post_act(self.post_attn(self.self_attn(y)))
        else:
            y = self.attn(self.conv2_kxk(y))
        return self.act(self.shortcut(x) + self.drop_path(self.conv3_1x1(y)))


class HaloNet(Backbone):
    """Network of `Scaling Local Self-Attention <https://arxiv.org/abs/2103.12731>`_, pure or with convolutions.

    Args:
        config: which one.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.

    Shapes:
        - input: :math:`(N, C, H, W)`
        - output: :math:`(N, K)`
    """

    def __init__(self, config: HaloNetConfig, num_classes: int = 1000, in_chans: int = 3) -> None:
        super().__init__()
        self.config = config
        widths, kernel = ((64,), 7) if config.stem == "7x7" else ((24, 32, 64), 3)
        stem: dict[str, nn.Module] = {}
        channels = in_chans
        for index, width in enumerate(widths, 1):
            last = index == len(widths) and not config.stem_pool
            stride = 2 if index == 1 or last else 1
            stem[f"conv{index}"] = ConvNormAct(channels, width, kernel, stride, config.make_act())
            channels = width
        # The finest map is the last one before the stem halves its size for the second time.
        finest = len(widths) if config.stem_pool else len(widths) - 1
        self.feature_info = FeatureInfo(
            [Feature(num_chs=widths[finest - 1], reduction=2, module=f"stem.conv{finest}")]
        )
        if config.stem_pool:
            stem["pool"] = nn.MaxPool2d(3, 2, 1)
        self.stem = nn.Sequential(OrderedDict(stem))

        drops = torch.linspace(0, config.drop_path_rate, len("".join(config.stages)), device="cpu").tolist()
        self.stages = nn.Sequential()
        for stage, letters in enumerate(config.stages):
            blocks = []
            for index, letter in enumerate(letters):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(
                    HaloBlock(config, channels, stage, attend=letter == "a", stride=stride, drop=drops.pop(0))
                )
                channels = config.widths[stage]
            self.stages.append(nn.Sequential(*blocks))
            self.feature_info.append(
                Feature(num_chs=channels, reduction=4 * 2**stage, module=f"stages.{stage}")
            )
        self.final_conv = nn.Identity()
        if config.final_width is not None:
            self.final_conv = ConvNormAct(channels, config.final_width, act=config.make_act())
            channels = config.final_width
            self.feature_info[-1] = Feature(
                num_chs=channels, reduction=self.feature_info[-1]["reduction"], module="final_conv"
            )
        self.num_features = channels
        self.head = nn.Sequential(OrderedDict({"drop": nn.Dropout(config.drop_rate)}))
        self.reset_classifier(num_classes)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw convolutions as in He et al., attention as it draws itself, and residual branches from zero."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for module in self.modules():
            if isinstance(module, HaloAttention):
                module.reset_parameters()
            elif isinstance(module, HaloBlock):
                nn.init.zeros_(module.conv3_1x1.get_submodule("bn").get_parameter("weight"))

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new classifier for `num_classes` in place; 0 leaves none."""
        self.num_classes = num_classes
        self.head.add_module("fc", nn.Identity())
        if num_classes:
            fc = nn.Linear(self.num_features, num_classes)
            nn.init.normal_(fc.weight, std=0.01)
            nn.init.zeros_(fc.bias)
            self.head.add_module("fc", fc)

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.head.get_submodule("fc")

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """Return the stem's and every stage's feature map."""
        maps = []
        finest = self.feature_info[0]["module"].removeprefix("stem.")
        for name, layer in self.stem.named_children():
            x = layer(x)
            if name == finest:
                maps.append(x)
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        if self.config.final_width is not None:
            maps[-1] = self.final_conv(x)
        return maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits of a feature map, or the pooled features if `pre_logits`."""
        x = self.head.get_submodule("drop")(x.mean((2, 3)))
        return x if pre_logits else self.get_classifier()(x)


def _pure(
    block: int,
    halo: int,
    values: float,
    width: float,
    third: int,
    size: int,
    final: int | None,
    params: float,
) -> Variant:
    config = HaloNetConfig(
        ("aaa", "aaa", "a" * third, "aaa"),
        tuple(int(channels * width) for channels in (64, 128, 256, 512)),
        value_ratio=values,
        block_size=block,
        halo_size=halo,
        final_width=final,
    )
    return Variant(HaloNet, config, params, size=size)


_TIMM = "timm's model cards"
_hybrid = partial(HaloNetConfig, widths=(256, 512, 1024, 2048), inner=(64, 128, 256, 512), stem="tiered")

VARIANTS = {
    "halonet_h0": _pure(8, 3, 1, 0.5, 7, 256, None, 5.5e6),
    "halonet_h1": _pure(8, 3, 1, 1, 10, 256, None, 8.1e6),
    "halonet_h2": _pure(8, 3, 1, 1.25, 11, 256, None, 9.4e6),
    "halonet_h3": _pure(10, 3, 1, 1.5, 12, 320, 1024, 11.8e6),
    "halonet_h4": _pure(12, 2, 1, 3, 12, 384, 1280, 19.1e6),
    "halonet_h5": _pure(14, 2, 2.5, 2, 23, 448, 1536, 30.7e6),
    "halonet_h6": _pure(8, 4, 3, 2.75, 24, 512, 1536, 43.4e6),
    "halonet_h7": _pure(10, 3, 4, 3.5, 26, 600, 2048, 67.4e6),
    "halonet26t": Variant(
        HaloNet, _hybrid(("cc", "cc", "ca", "aa"), halo_size=2), 12.48e6, 3.2e9, size=256, source=_TIMM
    ),
    "halonet50ts": Variant(
        HaloNet, _hybrid(("ccc", "ccca", "cacaca", "cac"), num_heads=(8, 4, 8, 8), act="silu"),
        22.73e6, 5.3e9, size=256, source=_TIMM,
    ),
    "sehalonet33ts": Variant(
        HaloNet,
        _hybrid(
            ("cc", "cca", "cca", "aa"), widths=(256, 512, 1024, 1536), stem_pool=False, act="silu", gate=True,
            final_width=1280,
        ),
        13.69e6, size=256, source=_TIMM,
    ),
    "halonet_test": Variant(
        HaloNet,
        HaloNetConfig(
            ("c", "a"), (16, 24), (8, 16), (1, 2), value_ratio=1.5, block_size=4, halo_size=1, stem="tiered",
            stem_pool=False, act="silu", gate=True, final_width=32,
        ),
        size=32,
    ),
}  # fmt: skip
