"""ConvMixer: patches mixed by depthwise and pointwise convolutions, at one width and one resolution throughout.

Paper: Trockman and Kolter, Patches Are All You Need?, https://arxiv.org/abs/2201.09792. Parameter names are those
of the public weights.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from omniconv.layers.conv.same import SameConv2d
from omniconv.models.backbone import Backbone, Feature, FeatureInfo, Variant

__all__ = ["ConvMixer", "ConvMixerConfig"]

_ACTS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}
_MAPS = 3


@dataclass(frozen=True)
class ConvMixerConfig:
    """What tells one ConvMixer from another.

    Attributes:
        width: h, channels of every map.
        depth: d, blocks.
        kernel_size: k, of the depthwise convolutions; an even one has its extra zero behind.
        patch_size: p, pixels along a side of a patch.
        act: activation after every convolution. The released 768/32 has "relu" where the paper says GELU.
        drop_rate: dropout before the classifier.
    """

    width: int = 1536
    depth: int = 20
    kernel_size: int = 9
    patch_size: int = 7
    act: Literal["gelu", "relu"] = "gelu"
    drop_rate: float = 0.0

    def __post_init__(self) -> None:
        if self.act not in _ACTS:
            raise ValueError(f"act must be one of {sorted(_ACTS)}: got {self.act!r}")

    def layer(self, conv: nn.Conv2d) -> list[nn.Module]:
        """Return what every layer is made of: `conv`, the activation, batch norm."""
        return [conv, _ACTS[self.act](), nn.BatchNorm2d(self.width)]


class Residual(nn.Module):
    """Adds its input to what `fn` makes of it."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        """Return fn(x) + x."""
        return self.fn(x) + x


def make_block(config: ConvMixerConfig) -> nn.Sequential:
    """Return a block: a depthwise convolution on a residual branch mixes places, a pointwise one mixes channels."""
    width, kernel = config.width, config.kernel_size
    depthwise = (
        nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
        if kernel % 2
        else SameConv2d(width, width, kernel, groups=width)
    )
    return nn.Sequential(
        Residual(nn.Sequential(*config.layer(depthwise))), *config.layer(nn.Conv2d(width, width, 1))
    )


class ConvMixer(Backbone):
    r"""Isotropic network of `Patches Are All You Need? <https://arxiv.org/abs/2201.09792>`_.

    .. math:: x_0 = \mathrm{BN}(\sigma(P * x)), \qquad
              y_l = x_{l-1} + \mathrm{BN}(\sigma(D_l * x_{l-1})), \qquad
              x_l = \mathrm{BN}(\sigma(W_l y_l))

    with the patch embedding P of stride p, depthwise :math:`D_l` and pointwise :math:`W_l`. Every block puts out
    :math:`(N, h, \lfloor H / p \rfloor, \lfloor W / p \rfloor)`; the last three are the feature maps.

    Args:
        config: which one.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.

    Shapes:
        - input: :math:`(N, C, H, W)`, at least p pixels along each side
        - output: :math:`(N, K)`
    """

    def __init__(
        self, config: ConvMixerConfig = ConvMixerConfig(), num_classes: int = 1000, in_chans: int = 3
    ) -> None:
        super().__init__()
        self.config = config
        patch = config.patch_size
        self.stem = nn.Sequential(*config.layer(nn.Conv2d(in_chans, config.width, patch, patch)))
        self.blocks = nn.Sequential(*(make_block(config) for _ in range(config.depth)))
        self.num_features = config.width
        self.feature_info = FeatureInfo(
            Feature(num_chs=config.width, reduction=patch, module=f"blocks.{index}")
            for index in range(config.depth)[-_MAPS:]
        )
        self.head_drop = nn.Dropout(config.drop_rate)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new classifier for `num_classes` in place; 0 leaves none."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.head

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """Return the maps of the last blocks."""
        x = self.stem(x)
        maps = []
        for block in self.blocks:
            x = block(x)
            maps.append(x)
        return maps[-_MAPS:]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits of a feature map, or the pooled features if `pre_logits`."""
        x = self.head_drop(x.mean((2, 3)))
        return x if pre_logits else self.head(x)


VARIANTS = {
    "convmixer_1536_20": Variant(ConvMixer, ConvMixerConfig(1536, 20, 9, 7), 51.626e6),
    "convmixer_768_32": Variant(ConvMixer, ConvMixerConfig(768, 32, 7, 7, act="relu"), 21.110e6),
    "convmixer_1024_20_ks9_p14": Variant(ConvMixer, ConvMixerConfig(1024, 20, 9, 14), 24.384e6),
    "convmixer_256_8_cifar": Variant(ConvMixer, ConvMixerConfig(256, 8, 9, 1), 0.7e6, size=32, classes=10),
    "convmixer_test": Variant(ConvMixer, ConvMixerConfig(24, 2, 4, 4), size=32),
    "convmixer_relu_test": Variant(ConvMixer, ConvMixerConfig(16, 1, 5, 2, act="relu"), size=32),
}
