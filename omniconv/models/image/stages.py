"""The skeleton of the modern image networks: a stem, stages of a downsampling and residual blocks, and a head.

Paper: Yu et al., MetaFormer Is Actually What You Need for Vision, https://arxiv.org/abs/2111.11418, which found that
this frame counts for more than what mixes the pixels in it. A family says what its stem, downsamplings, blocks and
head are. Its blocks are `MetaFormerBlock`, with one residual branch for the token mixer and one for the MLP, or
`MetaNeXtBlock`, with both on one branch. Parameter names are those of timm's MetaFormer.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from omniconv.layers.drop_path import DropPath
from omniconv.models.backbone import Backbone, Feature, FeatureInfo

__all__ = ["Head", "MetaFormerBlock", "MetaNeXtBlock", "Mlp", "StageConfig", "StageNetwork"]

Norm = Callable[[int], nn.Module]


@dataclass(frozen=True)
class StageConfig:
    """What every network of stages has.

    Attributes:
        depths: blocks a stage.
        widths: channels of each stage.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0 at the first.
    """

    depths: tuple[int, ...] = (2, 2, 6, 2)
    widths: tuple[int, ...] = (64, 128, 320, 512)
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.widths):
            raise ValueError(f"depths and widths must be equally long: got {self.depths} and {self.widths}")


class Scale(nn.Module):
    """A learned factor a channel."""

    def __init__(self, channels: int, value: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        """Scale the channels of `x`."""
        return x * self.scale[:, None, None]


def _scale(channels: int, value: float | None) -> nn.Module:
    return nn.Identity() if value is None else Scale(channels, value)


class Mlp(nn.Module):
    """Two pointwise layers with an activation between them.

    Args:
        channels: of input and output.
        hidden: channels between the layers.
        act: what stands between them.
        bias: of both layers.
        linear: write the layers as linear ones on a channels-last view instead of as 1x1 convolutions (weights
            with two more axes); the function is the same.
    """

    def __init__(
        self, channels: int, hidden: int, act: nn.Module, *, bias: bool = True, linear: bool = False
    ) -> None:
        super().__init__()
        layer = nn.Linear if linear else partial(nn.Conv2d, kernel_size=1)
        self.fc1 = layer(channels, hidden, bias=bias)
        self.act = act
        self.fc2 = layer(hidden, channels, bias=bias)
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """Mix the channels of every pixel of (N, C, H, W)."""
        if not self.linear:
            return self.fc2(self.act(self.fc1(x)))
        return self.fc2(self.act(self.fc1(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)


class MetaFormerBlock(nn.Module):
    r"""Token mixer and MLP, each after a norm and on a residual branch of its own.

    .. math:: y = \alpha_1 x + \gamma_1\, \mathrm{mix}(\mathrm{norm}_1(x)), \qquad
              z = \alpha_2 y + \gamma_2\, \mathrm{MLP}(\mathrm{norm}_2(y))

    Args:
        channels: C.
        token_mixer: what exchanges information between pixels.
        mlp: what mixes the channels of each pixel.
        norm: makes the norm over C channels; `nn.Identity` for none.
        layer_scale: initial :math:`\gamma`; None for no such factors.
        res_scale: initial :math:`\alpha`; None for no such factors.
        drop: stochastic depth of both branches.
    """

    def __init__(
        self,
        channels: int,
        token_mixer: nn.Module,
        mlp: nn.Module,
        norm: Norm,
        *,
        layer_scale: float | None = None,
        res_scale: float | None = None,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = norm(channels)
        self.token_mixer = token_mixer
        self.layer_scale1 = _scale(channels, layer_scale)
        self.res_scale1 = _scale(channels, res_scale)
        self.norm2 = norm(channels)
        self.mlp = mlp
        self.layer_scale2 = _scale(channels, layer_scale)
        self.res_scale2 = _scale(channels, res_scale)
        self.drop_path = DropPath(drop)

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        """Return the block's output; `context` goes to the token mixer."""
        y = self.layer_scale1(self.token_mixer(self.norm1(x), *context))
        x = self.res_scale1(x) + self.drop_path(y)
        return self.res_scale2(x) + self.drop_path(self.layer_scale2(self.mlp(self.norm2(x))))


class MetaNeXtBlock(nn.Module):
    r"""Token mixer, norm and MLP on one residual branch, as in ConvNeXt.

    .. math:: y = x + \gamma\, \mathrm{MLP}(\mathrm{norm}(\mathrm{mix}(x)))

    Args:
        channels: C.
        token_mixer: what exchanges information between pixels.
        mlp: what mixes the channels of each pixel.
        layer_scale: initial :math:`\gamma`; None for no such factors.
        drop: stochastic depth.
    """

    def __init__(
        self,
        channels: int,
        token_mixer: nn.Module,
        mlp: nn.Module,
        *,
        layer_scale: float | None = None,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.token_mixer = token_mixer
        self.norm = nn.BatchNorm2d(channels)
        self.mlp = mlp
        self.gamma = None if layer_scale is None else nn.Parameter(torch.full((channels,), layer_scale))
        self.drop_path = DropPath(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y = self.mlp(self.norm(self.token_mixer(x)))
        if self.gamma is not None:
            y = y * self.gamma[:, None, None]
        return x + self.drop_path(y)


class Head(nn.Module):
    """Norm, average over all pixels, dropout and classifier.

    Args:
        norm: over the last map's channels.
        drop_rate: of the dropout.
        norm_first: the norm stands before the average, as a batch norm must, instead of after it.
    """

    def __init__(self, norm: nn.Module, drop_rate: float, *, norm_first: bool = False) -> None:
        super().__init__()
        self.norm = norm
        self.drop = nn.Dropout(drop_rate)
        self.fc: nn.Module = nn.Identity()
        self.norm_first = norm_first

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits of a map, or what enters the classifier if `pre_logits`."""
        x = self.norm(x).mean((2, 3)) if self.norm_first else self.norm(x.mean((2, 3)))
        x = self.drop(x)
        return x if pre_logits else self.fc(x)


def init_weights(module: nn.Module) -> None:
    """Draw convolutions and linear layers from a normal distribution of deviation 0.02."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class StageNetwork(Backbone):
    """Skeleton: a stem of stride 4, stages of a downsampling and residual blocks, and a head.

    A family sets `config` and makes the parts: `make_stem`, `make_downsample`, `make_block`, and `make_head`
    and `make_classifier` where they are not the usual ones. The modules are `stem`, `stages.i.downsample`,
    `stages.i.blocks.j` and `head`.
    """

    init_weights: Callable[[nn.Module], None] = staticmethod(init_weights)

    def __init__(self, config: StageConfig, num_classes: int = 1000, in_chans: int = 3) -> None:
        super().__init__()
        self.config = config
        self.num_features = config.widths[-1]
        self.stem = self.make_stem(in_chans)
        drops = torch.linspace(0, config.drop_path_rate, sum(config.depths), device="cpu").tolist()
        self.stages = nn.Sequential()
        self.feature_info = FeatureInfo()
        for stage, (depth, width) in enumerate(zip(config.depths, config.widths, strict=True)):
            parts: OrderedDict[str, nn.Module] = OrderedDict(
                downsample=self.make_downsample(stage) if stage else nn.Identity(),
                blocks=nn.Sequential(
                    *(self.make_block(stage, index, drops.pop(0)) for index in range(depth))
                ),
            )
            self.stages.append(nn.Sequential(parts))
            self.feature_info.append(Feature(num_chs=width, reduction=4 * 2**stage, module=f"stages.{stage}"))
        self.head = self.make_head()
        self.reset_classifier(num_classes)
        self.apply(self.init_weights)

    def make_stem(self, in_chans: int) -> nn.Module:
        """Return what takes images to the first stage's width at a quarter of their size."""
        raise NotImplementedError

    def make_downsample(self, stage: int) -> nn.Module:
        """Return what takes the map of the stage before to half its size and the width of `stage`."""
        raise NotImplementedError

    def make_block(self, stage: int, index: int, drop: float) -> nn.Module:
        """Return block `index` of `stage`, whose branches are dropped with probability `drop`."""
        raise NotImplementedError

    def make_head(self) -> nn.Module:
        """Return what takes the last map to logits; its classifier comes afterwards."""
        return Head(nn.LayerNorm(self.num_features, eps=1e-6), self.config.drop_rate)

    def make_classifier(self, num_classes: int) -> nn.Module:
        """Return what takes the pooled features to logits."""
        return nn.Linear(self.num_features, num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new classifier for `num_classes` in place; 0 leaves none."""
        self.num_classes = num_classes
        self.head.fc = self.make_classifier(num_classes) if num_classes else nn.Identity()
        self.head.fc.apply(self.init_weights)

    def get_classifier(self) -> nn.Module:
        """Return what takes the pooled features to logits."""
        return self.head.get_submodule("fc")

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """Return every stage's feature map."""
        x = self.stem(x)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits of a feature map, or what enters the classifier if `pre_logits`."""
        return self.head(x, pre_logits)
