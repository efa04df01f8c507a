"""OSNet: streams of growing receptive field, weighted by one shared gate; OSNet-AIN: instance norms in searched places.

Papers: Zhou et al., Omni-Scale Feature Learning for Person Re-Identification, https://arxiv.org/abs/1905.00953;
Learning Generalisable Omni-Scale Representations, https://arxiv.org/abs/1910.06827. Parameter names are those of
torchreid's `osnet_ain_*`; those of its `osnet_*` have other names for the same streams (`OFFICIAL_NAMES`).
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor, nn

from omniconv.models.backbone import Backbone, Feature, FeatureInfo, Variant
from omniconv.models.weights import Rules

__all__ = ["PLACES", "OSBlock", "OSNet", "OSNetConfig", "Place"]

Place = Literal["none", "inside", "outside", "both"]
"""Where a block has instance norms: on the residual branch, after the addition, on both, or nowhere."""

PLACES: tuple[Place, ...] = ("none", "inside", "outside", "both")


@dataclass(frozen=True)
class OSNetConfig:
    """What tells one OSNet from another.

    Attributes:
        widths: channels of the stem and of every stage.
        places: of every stage, where each of its blocks has instance norms.
        stem_instance_norm: instance norm instead of batch norm after the first convolution.
        streams: T; stream t sees a window of 2t + 1 pixels.
        feature_dim: length of the descriptor before the classifier.
    """

    widths: tuple[int, ...] = (64, 256, 384, 512)
    places: tuple[tuple[Place, ...], ...] = (
        ("none", "none"), ("none", "none"), ("none", "none")
    )  # fmt: skip
    stem_instance_norm: bool = False
    streams: int = 4
    feature_dim: int = 512

    def __post_init__(self) -> None:
        if len(self.widths) != len(self.places) + 1:
            raise ValueError(
                f"widths must be one longer than places, for the stem: got {self.widths} and {self.places}"
            )


class ConvNorm(nn.Module):
    """Convolution without bias, a norm, and ReLU unless it is `linear`."""

    def __init__(
        self, in_channels: int, out_channels: int, *, norm: bool = True, linear: bool = False
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        if norm:
            self.bn = nn.BatchNorm2d(out_channels)
        self.norm, self.linear = norm, linear

    def forward(self, x: Tensor) -> Tensor:
        """Return the output."""
        x = self.conv(x)
        if self.norm:
            x = self.bn(x)
        return x if self.linear else x.relu()


class Stem(nn.Module):
    """7x7 convolution of stride 2, batch or instance norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, instance_norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 7, 2, 3, bias=False)
        self.bn = _instance_norm(out_channels) if instance_norm else nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output."""
        return self.bn(self.conv(x)).relu()


class LightConv(nn.Module):
    """Pointwise convolution, 3x3 depthwise convolution, norm, ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output."""
        return self.bn(self.conv2(self.conv1(x))).relu()


class LightStream(nn.Module):
    """A number of light convolutions, one after another."""

    def __init__(self, channels: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(LightConv(channels) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the output."""
        return self.layers(x)


class UnifiedGate(nn.Module):
    """The gates (N, C, 1, 1) of a stream's channels, from all their means; one for all streams."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, max(1, channels // reduction), 1)
        self.fc2 = nn.Conv2d(max(1, channels // reduction), channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the gates of `x`."""
        return self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


def _instance_norm(channels: int) -> nn.InstanceNorm2d:
    return nn.InstanceNorm2d(channels, affine=True)


class OSBlock(nn.Module):
    r"""Residual block of `OSNet <https://arxiv.org/abs/1905.00953>`_ over several scales at once.

    .. math:: y = x + W_2 \sum_{t=1}^{T} G(x^t) \odot x^t, \qquad x^t = \mathrm{Lite}_{3 \times 3}^t(W_1 x)

    with one gate G for all streams, and instance norms at the `place` that was searched.

    Args:
        in_channels, out_channels: channels; a 1x1 convolution changes the shortcut where they differ.
        streams: T.
        place: where the instance norms are.
    """

    def __init__(self, in_channels: int, out_channels: int, streams: int = 4, place: Place = "none") -> None:
        super().__init__()
        inner = out_channels // 4
        inside, outside = place in ("inside", "both"), place in ("outside", "both")
        self.conv1 = ConvNorm(in_channels, inner)
        self.conv2 = nn.ModuleList(LightStream(inner, depth) for depth in range(1, streams + 1))
        self.gate = UnifiedGate(inner)
        self.conv3 = ConvNorm(inner, out_channels, norm=not inside, linear=True)
        self.downsample = (
            ConvNorm(in_channels, out_channels, linear=True) if in_channels != out_channels else nn.Identity()
        )
        self.inner_norm = self.outer_norm = ""
        if inside:
            self.inner_norm = "IN_in" if outside else "IN"
            self.add_module(self.inner_norm, _instance_norm(out_channels))
        if outside:
            self.outer_norm = "IN_out" if inside else "IN"
            self.add_module(self.outer_norm, _instance_norm(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        reduced = self.conv1(x)
        total = reduced.new_zeros(())
        for stream in self.conv2:
            scale = stream(reduced)
            total = total + self.gate(scale) * scale
        y = self.conv3(total)
        if self.inner_norm:
            y = self.get_submodule(self.inner_norm)(y)
        y = y + self.downsample(x)
        if self.outer_norm:
            y = self.get_submodule(self.outer_norm)(y)
        return y.relu()


class OSNet(Backbone):
    """Network of `OSNet <https://arxiv.org/abs/1905.00953>`_ and `OSNet-AIN <https://arxiv.org/abs/1910.06827>`_.

    Args:
        config: which one.
        num_classes: identities that the classifier tells apart; 0 leaves the descriptor.
        in_chans: channels of the images.

    Shapes:
        - input: :math:`(N, C, H, W)`, usually 256 x 128
        - output: :math:`(N, K)`
    """

    def __init__(self, config: OSNetConfig, num_classes: int = 1000, in_chans: int = 3) -> None:
        super().__init__()
        self.config = config
        channels, reduction = config.widths[0], 4
        self.conv1 = Stem(in_chans, channels, config.stem_instance_norm)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.feature_info = FeatureInfo([Feature(num_chs=channels, reduction=2, module="conv1")])
        self.stages = [f"conv{stage + 2}" for stage in range(len(config.places))]
        last = len(config.places) - 1
        for stage, (width, places) in enumerate(zip(config.widths[1:], config.places, strict=True)):
            blocks = []
            for place in places:
                blocks.append(OSBlock(channels, width, config.streams, place))
                channels = width
            self.add_module(self.stages[stage], nn.Sequential(*blocks))
            if stage < last:
                self.feature_info.append(
                    Feature(num_chs=channels, reduction=reduction, module=self.stages[stage])
                )
                pool = nn.Sequential(ConvNorm(channels, channels), nn.AvgPool2d(2, 2))
                self.add_module(f"pool{stage + 2}", pool)
                reduction *= 2
        self.conv5 = ConvNorm(channels, channels)
        self.feature_info.append(Feature(num_chs=channels, reduction=reduction, module="conv5"))
        self.num_features = channels
        self.fc = nn.Sequential(
            nn.Linear(channels, config.feature_dim), nn.BatchNorm1d(config.feature_dim), nn.ReLU()
        )
        self.reset_classifier(num_classes)
        self.apply(init_weights)

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new classifier for `num_classes` in place; 0 leaves none."""
        self.num_classes = num_classes
        self.classifier = nn.Linear(self.config.feature_dim, num_classes) if num_classes else nn.Identity()
        init_weights(self.classifier)

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.classifier

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """Return the feature maps of the stem, of every stage but the last, and of the last convolution."""
        maps = [self.conv1(x)]
        x = self.maxpool(maps[0])
        for stage, name in enumerate(self.stages):
            x = self.get_submodule(name)(x)
            if stage < len(self.stages) - 1:
                maps.append(x)
                x = self.get_submodule(f"pool{stage + 2}")(x)
        return [*maps, self.conv5(x)]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits of a feature map, or the descriptor (N, feature_dim) if `pre_logits`."""
        x = self.fc(x.mean((2, 3)))
        return x if pre_logits else self.classifier(x)


def init_weights(module: nn.Module) -> None:
    """Draw the weights of one module as torchreid does."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, 0, 0.01)
    if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


OFFICIAL_NAMES: Rules = (
    (r"\.conv2a\.", ".conv2.0.layers.0."),
    (r"\.conv2b\.", ".conv2.1.layers."),
    (r"\.conv2c\.", ".conv2.2.layers."),
    (r"\.conv2d\.", ".conv2.3.layers."),
    (r"^conv([23])\.2\.0\.", r"pool\1.0."),
)
"""From the names of torchreid's `osnet_*` to ours, which are those of its `osnet_ain_*`."""


def _scaled(width: float, params: float | None, **more) -> Variant:
    widths = tuple(int(channels * width) for channels in (64, 256, 384, 512))
    # Published without the classifier. Multiply-adds are published for 256 x 128 pixels; see the paper's check.
    return Variant(OSNet, OSNetConfig(widths, **more), params, size=256, classes=0)


_ain = partial(
    _scaled,
    places=(("inside", "inside"), ("none", "inside"), ("inside", "none")),
    stem_instance_norm=True,
)

VARIANTS = {
    # The narrow ones are published as 0.6M and 0.2M: one digit, coarser than the 1% to which counts are held.
    "osnet_x1_0": _scaled(1.0, 2.2e6),
    "osnet_x0_75": _scaled(0.75, 1.3e6),
    "osnet_x0_5": _scaled(0.5, None),
    "osnet_x0_25": _scaled(0.25, None),
    "osnet_ibn_x1_0": _scaled(
        1.0, 2.2e6, places=(("outside",) * 2, ("none",) * 2, ("none",) * 2), stem_instance_norm=True
    ),
    "osnet_ain_x1_0": _ain(1.0, 2.2e6),
    "osnet_ain_x0_75": _ain(0.75, 1.3e6),
    "osnet_ain_x0_5": _ain(0.5, None),
    "osnet_ain_x0_25": _ain(0.25, None),
    "osnet_test": Variant(
        OSNet,
        OSNetConfig((16, 24, 32), (("none", "inside"), ("outside", "both")), True, streams=2, feature_dim=64),
        size=64,
    ),
}
