"""DOLG: one descriptor of an image from what its details add to the whole.

Paper: Yang et al., https://arxiv.org/abs/2108.02927. Local features lose their component along the global one; what
is left is pooled and joined to it. The trunk is a ResNet under the names of `models/image/resnet.py`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.layers.pool.gem import GeneralizedMeanPool2d
from omniconv.models.backbone import Backbone, Feature, FeatureInfo, Variant
from omniconv.models.image.resnet import ResNet, ResNetConfig
from omniconv.models.weights import Rules

__all__ = ["DOLG", "DOLGConfig", "LocalBranch", "MultiAtrous", "OrthogonalFusion"]


@dataclass(frozen=True)
class DOLGConfig:
    """What tells one DOLG from another.

    Attributes:
        depths: blocks of the trunk's stages; local features come from the third, the global one from the fourth.
        widths: base width of each stage, of which a bottleneck puts out four times as much.
        stem: of the trunk, "7x7", or "3x3" for images of about 32 pixels.
        dilations: of the multi-atrous convolutions.
        atrous_channels: channels of each of them.
        descriptor_dim: length of the descriptor.
    """

    depths: tuple[int, int, int, int] = (3, 4, 6, 3)
    widths: tuple[int, int, int, int] = (64, 128, 256, 512)
    stem: Literal["7x7", "3x3"] = "7x7"
    dilations: tuple[int, ...] = (6, 12, 18)
    atrous_channels: int = 512
    descriptor_dim: int = 512


class MultiAtrous(nn.Module):
    """1x1 convolution, dilated 3x3 convolutions and the mean of the map, side by side, then a 1x1 convolution.

    Args:
        channels: channels of input and output.
        inner: channels of each branch.
        dilations: of the 3x3 convolutions.
    """

    def __init__(self, channels: int, inner: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.aspp = nn.ModuleList([nn.Conv2d(channels, inner, 1)])
        for dilation in dilations:
            self.aspp.append(nn.Conv2d(channels, inner, 3, padding=dilation, dilation=dilation))
        self.im_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, inner, 1), nn.ReLU())
        self.conv_after = nn.Sequential(nn.Conv2d((len(dilations) + 2) * inner, channels, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """Return the output, of the input's shape."""
        mean = self.im_pool(x).expand(-1, -1, *x.shape[2:])
        return self.conv_after(torch.cat([mean, *(conv(x) for conv in self.aspp)], 1))


class LocalBranch(nn.Module):
    r"""Local features: directions from a multi-atrous block, lengths from an attention map.

    .. math:: f_l = \mathrm{softplus}\bigl(w * \mathrm{ReLU}(z)\bigr) \frac{z}{\|z\|}, \qquad
              z = \mathrm{BN}(W * \mathrm{atrous}(x))

    Args:
        channels: channels of input and output.
        inner: channels of each multi-atrous branch.
        dilations: of these.
    """

    def __init__(self, channels: int, inner: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.aspp = MultiAtrous(channels, inner, dilations)
        self.conv1 = nn.Conv2d(channels, channels, 1)
        self.bn = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the local features, of the input's shape."""
        z = self.bn(self.conv1(self.aspp(x)))
        return F.softplus(self.conv2(z.relu())) * F.normalize(z)


class OrthogonalFusion(nn.Module):
    r"""The global feature at every place, beside the local one without its component along it.

    .. math:: \Bigl[f_g,\ f_l - \frac{f_l \cdot f_g}{\|f_g\|^2} f_g\Bigr]

    Shapes:
        - local :math:`(N, C, H, W)`, global :math:`(N, C)`
        - output: :math:`(N, 2C, H, W)`
    """

    def forward(self, local: Tensor, whole: Tensor) -> Tensor:
        """Return the fused map."""
        whole = whole[:, :, None, None]
        # A global feature of zero has no direction; the small number leaves the local one as it is.
        share = (local * whole).sum(1, keepdim=True) / (whole * whole).sum(1, keepdim=True).clamp(min=1e-12)
        return torch.cat([whole.expand_as(local), local - share * whole], 1)


class DOLG(Backbone):
    """Network of `DOLG <https://arxiv.org/abs/2108.02927>`_.

    `forward_head(..., pre_logits=True)`, or `num_classes=0`, gives the descriptor; train it with `ArcFaceLoss` on its
    cosines with the classifier's weight.

    Args:
        config: which one.
        num_classes: landmarks that the classifier tells apart; 0 leaves the descriptor.
        in_chans: channels of the images.

    Shapes:
        - input: :math:`(N, C, H, W)`
        - output: :math:`(N, K)`
    """

    def __init__(self, config: DOLGConfig, num_classes: int = 1000, in_chans: int = 3) -> None:
        super().__init__()
        self.config = config
        trunk = ResNetConfig(config.depths, config.widths, stem=config.stem)
        self.globalmodel = ResNet(trunk, 0, in_chans)
        info = self.globalmodel.feature_info
        channels = info[3]["num_chs"]
        self.localmodel = LocalBranch(channels, config.atrous_channels, config.dilations)
        self.pool_g = GeneralizedMeanPool2d()
        self.fc_t = nn.Linear(info[4]["num_chs"], channels)
        self.fusion = OrthogonalFusion()
        self.num_features = 2 * channels
        fused = Feature(num_chs=2 * channels, reduction=info[3]["reduction"], module="fusion")
        self.feature_info = FeatureInfo(
            [*({**feature, "module": f"globalmodel.{feature['module']}"} for feature in info[:3]), fused]
        )
        self.fc = nn.Linear(2 * channels, config.descriptor_dim)
        self.reset_classifier(num_classes)
        for module in self.localmodel.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new classifier for `num_classes` in place; 0 leaves none."""
        self.num_classes = num_classes
        descriptor = self.config.descriptor_dim
        self.classifier = nn.Linear(descriptor, num_classes, bias=False) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer, whose rows are the classes' directions."""
        return self.classifier

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """Return the maps of the trunk's stem and first two stages, and the fused map."""
        *maps, third, fourth = self.globalmodel.forward_stages(x)
        return [*maps, self.fusion(self.localmodel(third), self.fc_t(self.pool_g(fourth)))]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits of a fused map, or the descriptor if `pre_logits`."""
        x = self.fc(x.mean((2, 3)))
        return x if pre_logits else self.classifier(x)


OFFICIAL_NAMES: Rules = (
    (r"^globalmodel\.stem\.conv\.", "globalmodel.conv1."),
    (r"^globalmodel\.stem\.bn\.", "globalmodel.bn1."),
    *((rf"\.s([1-4])\.b{index + 1}\.", rf".layer\1.{index}.") for index in range(36)),
    (r"(layer\d\.\d+)\.proj\.", r"\1.downsample.0."),
    (r"(layer\d\.\d+)\.bn\.", r"\1.downsample.1."),
    *((rf"\.f\.{letter}\.", f".conv{number}.") for number, letter in ((1, "a"), (2, "b"), (3, "c"))),
    *((rf"\.f\.{letter}_bn\.", f".bn{number}.") for number, letter in ((1, "a"), (2, "b"), (3, "c"))),
    (r"^desc_cls\.weight$", "classifier.weight"),
    (r"^desc_cls\.t$", ""),
)
"""From the names of the official repository to ours."""

VARIANTS = {
    "dolg_resnet50": Variant(DOLG, DOLGConfig()),
    "dolg_resnet101": Variant(DOLG, DOLGConfig((3, 4, 23, 3))),
    "dolg_test": Variant(
        DOLG, DOLGConfig((1, 1, 1, 1), (4, 4, 8, 8), atrous_channels=6, descriptor_dim=16), size=64
    ),
}
