"""ParCNetV2: oversized convolutions under a gate, in the token mixers and in the MLPs.

Paper: Xu et al., https://arxiv.org/abs/2211.07157, on the layout of PoolFormerV2.
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.layers.conv.oversized import OversizedConv2d
from omniconv.models.backbone import Variant
from omniconv.models.image.stages import MetaFormerBlock, StageConfig, StageNetwork
from omniconv.models.weights import Rules

__all__ = ["ParCNetV2", "ParCNetV2Config"]


@dataclass(frozen=True)
class ParCNetV2Config(StageConfig):
    """What tells one ParCNetV2 from another.

    Attributes:
        kernel_sizes: of each stage's oversized convolutions: 2 H - 1 for the maps of 224-pixel images.
        resize_kernels: stretch these kernels to the maps of images of any other size.
        res_scale: initial factor of the shortcuts of all but the first two stages.
    """

    depths: tuple[int, ...] = (3, 3, 12, 3)
    widths: tuple[int, ...] = (64, 128, 320, 512)
    kernel_sizes: tuple[int, ...] = (111, 55, 27, 13)
    resize_kernels: bool = False
    res_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.kernel_sizes) != len(self.depths):
            raise ValueError(
                f"depths and kernel_sizes must be equally long: got {self.depths} and {self.kernel_sizes}"
            )


class UnitNorm2d(nn.Module):
    r"""Norm of each pixel over its channels to length one, :math:`w \odot c / \|c\|` with :math:`c = x - \bar x`.

    A layer norm gives vectors of length :math:`\sqrt{C}`.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise every pixel of `x`."""
        centred = x - x.mean(1, keepdim=True)
        return F.normalize(centred, dim=1, eps=1e-6) * self.weight[:, None, None]


class GatedOversizedMixer(nn.Module):
    r"""Token mixer: half of the expanded channels gate the other half's oversized and 7x7 convolutions.

    .. math:: y = W_2 \bigl(u \odot (k_o * g + k_7 * g)\bigr), \qquad (u, v) = W_1 x, \quad g = \mathrm{GELU}(v)
    """

    def __init__(self, channels: int, kernel_size: int, *, resize: bool) -> None:
        super().__init__()
        self.pwconv1 = nn.Conv2d(channels, 2 * channels, 1)
        self.act = nn.GELU()
        self.dwconv1 = OversizedConv2d(channels, kernel_size, resize=resize)
        self.dwconv2 = nn.Conv2d(channels, channels, 7, padding=3, groups=channels, bias=False)
        self.pwconv2 = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the pixels of `x`."""
        gate, y = self.pwconv1(x).chunk(2, 1)
        y = self.act(y)
        return self.pwconv2(gate * (self.dwconv1(y) + self.dwconv2(y)))


class GatedMlp(nn.Module):
    r"""Bifurcate gate unit, :math:`W_2 (u \odot \mathrm{GELU}(v))` with :math:`(u, v) = W_1 x` of 5 C channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, 5 * channels)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(5 * channels // 2, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the channels of every pixel of (N, C, H, W)."""
        u, v = self.fc1(x.permute(0, 2, 3, 1)).chunk(2, 3)
        return self.fc2(u * self.act(v)).permute(0, 3, 1, 2)


class ParCNetV2(StageNetwork):
    """Network of `ParCNetV2 <https://arxiv.org/abs/2211.07157>`_.

    Args:
        config: which one.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.

    Shapes:
        - input: :math:`(N, C, H, W)`
        - output: :math:`(N, K)`
    """

    config: ParCNetV2Config

    def make_stem(self, in_chans: int) -> nn.Module:
        """Return a 7x7 convolution of stride 4 and a norm."""
        width = self.config.widths[0]
        conv = nn.Conv2d(in_chans, width, 7, 4, 2)
        return nn.Sequential(OrderedDict(conv=conv, norm=UnitNorm2d(width)))

    def make_downsample(self, stage: int) -> nn.Module:
        """Return a norm and a 3x3 convolution of stride 2."""
        before, after = self.config.widths[stage - 1 : stage + 1]
        conv = nn.Conv2d(before, after, 3, 2, 1)
        return nn.Sequential(OrderedDict(norm=UnitNorm2d(before), conv=conv))

    def make_block(self, stage: int, index: int, drop: float) -> nn.Module:
        """Return a block of `stage`."""
        config, width = self.config, self.config.widths[stage]
        return MetaFormerBlock(
            width,
            GatedOversizedMixer(width, config.kernel_sizes[stage], resize=config.resize_kernels),
            GatedMlp(width),
            UnitNorm2d,
            res_scale=config.res_scale if stage >= 2 else None,
            drop=drop,
        )


OFFICIAL_NAMES: Rules = (
    (r"^stages\.(\d+)\.", r"stages.\1.blocks."),
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"\.(pre|post)_norm\.", ".norm."),
    (r"^norm\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)
"""From https://github.com/XuRuihan/ParCNetV2."""


def _row(depths: tuple[int, ...], widths: tuple[int, ...], params: float, macs: float) -> Variant:
    return Variant(ParCNetV2, ParCNetV2Config(depths, widths), params, macs)


VARIANTS = {
    "parcnetv2_xt": _row((3, 3, 9, 2), (48, 96, 192, 320), 7.4e6, 1.6e9),
    "parcnetv2_tiny": _row((3, 3, 12, 3), (64, 128, 320, 512), 25e6, 4.3e9),
    "parcnetv2_small": _row((3, 9, 24, 3), (64, 128, 320, 512), 39e6, 7.8e9),
    "parcnetv2_base": _row((3, 9, 24, 3), (96, 192, 384, 576), 56e6, 12.5e9),
    "parcnetv2_test": Variant(
        ParCNetV2, ParCNetV2Config((1, 1), (8, 16), kernel_sizes=(15, 7), resize_kernels=True), size=32
    ),
}
