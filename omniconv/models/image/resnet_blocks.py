"""What residual networks are put together from: stems, norms, gates, shortcuts and blocks, by their names.

A configuration names its parts, and the tables `STEMS`, `NORMS` and `GATES` say how each is made. Papers: He et al.,
https://arxiv.org/abs/1512.03385; ResNeXt, Xie et al., https://arxiv.org/abs/1611.05431; the deep stems and
average-pooled shortcuts, He et al., https://arxiv.org/abs/1812.01187; anti-aliasing, Zhang,
https://arxiv.org/abs/1904.11486; those of the gates and norms stand in their modules.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.layers.attention.eca import EfficientChannelAttention
from omniconv.layers.attention.pkcam import PKCAM
from omniconv.layers.attention.scse import SCSE
from omniconv.layers.attention.se import SqueezeExcite
from omniconv.layers.conv.spd import SPDConv2d
from omniconv.layers.drop_path import DropPath
from omniconv.layers.norm.evonorm import EvoNormB0, EvoNormS0
from omniconv.layers.norm.ibn import IBN
from omniconv.layers.pool.blur import BlurPool2d

__all__ = [
    "GATES", "NORMS", "STEMS", "BasicBlock", "Bottleneck", "RecallingStage", "ResNetConfig", "ResidualBlock",
    "make_shortcut", "make_stem_pool",
]  # fmt: skip


@dataclass(frozen=True)
class ResNetConfig:
    """What tells one residual network from another.

    Attributes:
        depths: blocks a stage.
        widths: base width of each stage; a bottleneck puts out four times as many channels.
        bottleneck: 1x1, 3x3, 1x1 blocks instead of two 3x3.
        cardinality: groups of the bottleneck's 3x3 convolution (ResNeXt).
        base_width: channels of one group when the stage's width is 64.
        stem: "7x7" (stride 2, then max pooling), "deep" (three 3x3), "tiered" (deep with rising widths), "rs" (deep,
            and a strided 3x3 convolution for the pooling), "spd" (two space-to-depth convolutions for stride and
            pooling), or "3x3" (stride 1 and no pooling, for images of about 32 pixels).
        stem_width: width of the deep stems' first convolutions.
        shortcut: where shapes change, a strided 1x1 convolution ("conv"), average pooling before a 1x1
            convolution ("pool"), or every other pixel with zero channels added ("pad", without parameters).
        shortcut_kernel: kernel of the "conv" shortcut from the second stage on.
        reduce_first: divides the width of the bottleneck's first convolution (SENet-154).
        gate: "se", "eca" or "scse" before the addition in every block, or "pkcam" in the first block of each stage.
        gate_kernels: ECA's kernel size of each stage; the paper's formula if empty.
        gate_reduction: r of the bottlenecks in "se" (ResNet-RS has 4) and "scse"; None for their papers' 16 and 2.
        norm: "batch", "group" (32 groups), or "evonorm_b0" or "evonorm_s0", which take the place of the inner
            activations as well.
        ibn: "a" for IBN as the first norm of every block in all but the last stage, "b" for instance normalisation
            after the stem and after the last addition of each stage in the first half of them.
        anti_alias: let the blocks' convolutions and the pooling of the stem keep the resolution, and subsample
            behind them with "blur" (binomial filter) or "average" (2x2 pooling, for the stem's pooling as well).
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0 at the first.
    """

    depths: tuple[int, ...] = (3, 4, 6, 3)
    widths: tuple[int, ...] = (64, 128, 256, 512)
    bottleneck: bool = True
    cardinality: int = 1
    base_width: int = 64
    stem: Literal["7x7", "deep", "tiered", "rs", "spd", "3x3"] = "7x7"
    stem_width: int = 32
    shortcut: Literal["conv", "pool", "pad"] = "conv"
    shortcut_kernel: int = 1
    reduce_first: int = 1
    gate: Literal["se", "eca", "scse", "pkcam"] | None = None
    gate_kernels: tuple[int, ...] = ()
    gate_reduction: int | None = None
    norm: Literal["batch", "group", "evonorm_b0", "evonorm_s0"] = "batch"
    ibn: Literal["a", "b"] | None = None
    anti_alias: Literal["blur", "average"] | None = None
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.widths):
            raise ValueError(f"depths and widths must be equally long: got {self.depths} and {self.widths}")
        for name, known in (("stem", STEMS), ("gate", GATES), ("norm", NORMS)):
            if getattr(self, name) not in (None, *known):
                raise ValueError(f"{name} must be one of {', '.join(known)}: got {getattr(self, name)!r}")
        if self.gate_kernels and (self.gate != "eca" or len(self.gate_kernels) != len(self.depths)):
            raise ValueError(f"gate_kernels needs gate='eca' and one size a stage: got {self.gate_kernels}")
        if self.ibn and self.norm != "batch":
            raise ValueError(f"ibn needs norm='batch': got {self.norm!r}")

    @property
    def block(self) -> Any:
        """The class of the blocks, a `ResidualBlock`."""
        return Bottleneck if self.bottleneck else BasicBlock

    def make_norm(self, channels: int, *, act: bool = False) -> nn.Module:
        """Return the norm over `channels`; one that holds an activation leaves it out unless `act`."""
        if self.norm in FUSED:
            return NORMS[self.norm](channels, act=act)
        return NORMS[self.norm](channels)

    def make_act(self) -> nn.Module:
        """Return what follows a norm with `act`."""
        return nn.Identity() if self.norm in FUSED else nn.ReLU(inplace=True)

    def make_first_norm(self, channels: int, stage: int) -> nn.Module:
        """Return the first norm of a block of `stage`."""
        if self.ibn == "a" and stage + 1 < len(self.depths):
            return IBN(channels)
        return self.make_norm(channels, act=True)

    def make_gate(self, channels: int, stage: int, index: int) -> nn.Module:
        """Return the gate of block `index` of `stage`, which puts out `channels`."""
        if self.gate is None or (self.gate == "pkcam" and index > 0):
            return nn.Identity()
        return GATES[self.gate](self, channels, stage)

    def make_subsampling(self, stride: int) -> nn.Module:
        """Return what follows a convolution that keeps the resolution because of `anti_alias`."""
        if stride == 1 or self.anti_alias is None:
            return nn.Identity()
        if self.anti_alias == "blur":
            return BlurPool2d(stride=stride)
        return nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False)


NORMS: Mapping[str, Callable[..., nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "group": partial(nn.GroupNorm, 32),
    "evonorm_b0": EvoNormB0,
    "evonorm_s0": EvoNormS0,
}
"""Name -> function of the channels."""

FUSED = ("evonorm_b0", "evonorm_s0")
"""Norms that hold an activation, which `act=False` leaves out."""


def _se(config: ResNetConfig, channels: int, stage: int) -> nn.Module:
    reduced = (channels // (config.gate_reduction or 16) + 4) // 8 * 8
    return SqueezeExcite(channels, max(8, reduced))


def _eca(config: ResNetConfig, channels: int, stage: int) -> nn.Module:
    return EfficientChannelAttention(channels, config.gate_kernels[stage] if config.gate_kernels else None)


def _scse(config: ResNetConfig, channels: int, stage: int) -> nn.Module:
    return SCSE(channels, config.gate_reduction or 2)


def _pkcam(config: ResNetConfig, channels: int, stage: int) -> nn.Module:
    return PKCAM(channels, stage + 1)  # the stem, and every earlier stage


GATES: Mapping[str, Callable[[ResNetConfig, int, int], nn.Module]] = {
    "se": _se, "eca": _eca, "scse": _scse, "pkcam": _pkcam,
}  # fmt: skip
"""Name -> function of (configuration, channels, stage)."""

Stem = tuple[nn.Module, int]
"""The convolutions before the first norm, and the channels that they put out."""


def _small_stem(config: ResNetConfig, in_chans: int) -> Stem:
    channels = config.widths[0]
    return nn.Conv2d(in_chans, channels, 3, 1, 1, bias=False), channels


def _large_stem(config: ResNetConfig, in_chans: int) -> Stem:
    return nn.Conv2d(in_chans, 64, 7, 2, 3, bias=False), 64


def _spd_stem(config: ResNetConfig, in_chans: int) -> Stem:
    return SPDConv2d(in_chans, 64, bias=False), 64


def _deep_stem(config: ResNetConfig, in_chans: int) -> Stem:
    width = config.stem_width
    first = width * 3 // 4 if config.stem == "tiered" else width
    return nn.Sequential(
        nn.Conv2d(in_chans, first, 3, 2, 1, bias=False),
        config.make_norm(first, act=True),
        config.make_act(),
        nn.Conv2d(first, width, 3, 1, 1, bias=False),
        config.make_norm(width, act=True),
        config.make_act(),
        nn.Conv2d(width, 2 * width, 3, 1, 1, bias=False),
    ), 2 * width


STEMS: Mapping[str, Callable[[ResNetConfig, int], Stem]] = {
    "7x7": _large_stem, "deep": _deep_stem, "tiered": _deep_stem, "rs": _deep_stem, "spd": _spd_stem,
    "3x3": _small_stem,
}  # fmt: skip
"""Name -> function of (configuration, channels of the images)."""


def make_stem_pool(config: ResNetConfig, channels: int) -> nn.Module:
    """Return what halves the resolution between stem and first stage."""
    if config.stem == "3x3":
        return nn.Identity()
    if config.stem in ("rs", "spd"):
        conv = (
            SPDConv2d(channels, channels, bias=False)
            if config.stem == "spd"
            else nn.Conv2d(channels, channels, 3, 2, 1, bias=False)
        )
        return nn.Sequential(conv, config.make_norm(channels, act=True), config.make_act())
    if config.anti_alias == "blur":
        return nn.Sequential(nn.MaxPool2d(3, 1, 1), config.make_subsampling(2))
    return config.make_subsampling(2) if config.anti_alias else nn.MaxPool2d(3, 2, 1)


class PadShortcut(nn.Module):
    """Option A of the ResNet paper: every `stride`-th pixel, with zero channels on both sides."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.extra, self.stride = out_channels - in_channels, stride

    def forward(self, x: Tensor) -> Tensor:
        """Subsample `x` and pad its channels."""
        before = self.extra // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.extra - before))


def make_shortcut(
    config: ResNetConfig, in_channels: int, out_channels: int, stride: int, stage: int
) -> nn.Module:
    """Return the shortcut between two shapes; its state-dict names are those of the public weights."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    if config.shortcut == "pad":
        return PadShortcut(in_channels, out_channels, stride)
    norm = config.make_norm(out_channels)
    if config.shortcut == "pool":
        pool = (
            nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False) if stride > 1 else nn.Identity()
        )
        return nn.Sequential(pool, nn.Conv2d(in_channels, out_channels, 1, bias=False), norm)
    kernel = config.shortcut_kernel if stage > 0 else 1
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, (kernel - 1) // 2, bias=False)
    return nn.Sequential(conv, norm)


class ResidualBlock(nn.Module):
    """What all blocks share: y = relu(shortcut(x) + gate(residual(x))).

    A kind of block makes its convolutions, calls `finish`, and says what `residual` is.

    Args of every kind:
        config: of the network.
        in_channels: of the input.
        width: base width of the stage; the block puts out `expansion` times as many channels.
        stride: of the block.
        stage: number of the stage, from 0.
        drop: probability of stochastic depth.
        index: number of the block in its stage, from 0.
    """

    expansion: int
    last_norm: str
    """Name of the norm before the addition."""

    def finish(
        self,
        config: ResNetConfig,
        in_channels: int,
        out: int,
        stride: int,
        stage: int,
        drop: float,
        index: int,
    ) -> None:
        """Make gate, shortcut and the end; the last modules, as the order of random draws is part of the networks."""
        self.se = config.make_gate(out, stage, index)
        self.downsample = make_shortcut(config, in_channels, out, stride, stage)
        self.drop_path = DropPath(drop)
        early = stage < len(config.depths) // 2 and index + 1 == config.depths[stage]
        self.IN = nn.GroupNorm(out, out) if config.ibn == "b" and early else nn.Identity()
        self.act = nn.ReLU(inplace=True)

    def residual(self, x: Tensor) -> Tensor:
        """Return what the gate scales."""
        raise NotImplementedError

    def join(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the gated residual `y` to the shortcut."""
        return self.act(self.IN(self.downsample(x) + self.drop_path(y)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        return self.join(x, self.se(self.residual(x)))


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions."""

    expansion = 1
    last_norm = "bn2"

    def __init__(
        self,
        config: ResNetConfig,
        in_channels: int,
        width: int,
        stride: int,
        stage: int,
        drop: float,
        index: int = 0,
    ) -> None:
        super().__init__()
        inner = width // config.reduce_first
        self.conv1 = nn.Conv2d(in_channels, inner, 3, 1 if config.anti_alias else stride, 1, bias=False)
        self.bn1 = config.make_first_norm(inner, stage)
        self.act1 = config.make_act()
        self.aa = config.make_subsampling(stride)
        self.conv2 = nn.Conv2d(inner, width, 3, 1, 1, bias=False)
        self.bn2 = config.make_norm(width)
        self.finish(config, in_channels, width, stride, stage, drop, index)

    def residual(self, x: Tensor) -> Tensor:
        """Return what the gate scales."""
        y = self.aa(self.act1(self.bn1(self.conv1(x))))
        return self.bn2(self.conv2(y))


class Bottleneck(ResidualBlock):
    """1x1 reduce, 3x3 (in `cardinality` groups), 1x1 expand; the 3x3 carries the stride.

    The grouped convolution is ResNeXt's sum over C paths of the same small transform, written as one.
    """

    expansion = 4
    last_norm = "bn3"

    def __init__(
        self,
        config: ResNetConfig,
        in_channels: int,
        width: int,
        stride: int,
        stage: int,
        drop: float,
        index: int = 0,
    ) -> None:
        super().__init__()
        inner = width * config.base_width // 64 * config.cardinality
        first = inner // config.reduce_first
        out = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, first, 1, bias=False)
        self.bn1 = config.make_first_norm(first, stage)
        self.act1 = config.make_act()
        step = 1 if config.anti_alias else stride
        self.conv2 = nn.Conv2d(first, inner, 3, step, 1, groups=config.cardinality, bias=False)
        self.bn2 = config.make_norm(inner, act=True)
        self.act2 = config.make_act()
        self.aa = config.make_subsampling(stride)
        self.conv3 = nn.Conv2d(inner, out, 1, bias=False)
        self.bn3 = config.make_norm(out)
        self.finish(config, in_channels, out, stride, stage, drop, index)

    def residual(self, x: Tensor) -> Tensor:
        """Return what the gate scales."""
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.aa(self.act2(self.bn2(self.conv2(y))))
        return self.bn3(self.conv3(y))


class RecallingStage(nn.Sequential):
    """A stage whose first gate is a PKCAM: it reads `memory`, to which the last block's means are added."""

    def forward(self, x: Tensor, memory: list[Tensor]) -> Tensor:  # type: ignore[override]
        """Return the stage's map of `x`."""
        y = x
        for index, block in enumerate(self):
            assert isinstance(block, ResidualBlock)
            y = block.residual(x)
            x = block.join(x, block.se(y, *memory) if index == 0 else block.se(y))
        memory.append(y.mean((2, 3)))
        return x
