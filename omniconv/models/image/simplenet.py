"""SimpleNet: thirteen plain convolutions without a branch.

Paper: Hasanpour et al., Lets Keep It Simple, https://arxiv.org/abs/1608.06037. Its design rules can be read off the
variants: homogeneous groups of 3x3 convolutions whose width only rises slowly, each ended by 2x2 maximum pooling;
few early poolings; 1x1 convolutions only near the end, where maps are small. Parameter names, the strides of the
ImageNet forms and the initial weights are those of the authors' PyTorch code; the paper's own Caffe files leave
batch norm off the last three convolutions.
"""

import math
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.models.backbone import Backbone, Feature, FeatureInfo, Variant

__all__ = ["SimpleNet", "SimpleNetConfig"]

_CIFAR = ((64, 128, 128, 128), (128, 128, 256), (256, 256), (512, 2048, 256), (256,))
_CIFAR_310K = ((64, 32, 32, 32), (32, 32, 64), (64, 64), (128, 256, 64), (64,))
_IMAGENET_5M = ((64, 128, 128, 128, 128, 128), (256, 256, 256, 512), (2048, 256, 256))
_IMAGENET_9M = ((128, 192, 192, 192, 192, 192), (320, 320, 320, 640), (2560, 320, 320))


@dataclass(frozen=True)
class SimpleNetConfig:
    """What tells one SimpleNet from another.

    Attributes:
        groups: widths of the convolutions of each group; between groups the map is pooled.
        pointwise: which convolutions, counted from 0, are 1x1; the others are 3x3.
        strides: strides of the first convolutions; the others have 1.
        scale: multiplies all widths.
        drop_before_pool: dropout behind the last convolution of a group too, not only behind the pooling.
        drop_rate: dropout of whole channels behind convolutions and poolings.
        head_drop_rate: the same behind the last pooling, before the classifier.
    """

    groups: tuple[tuple[int, ...], ...] = _CIFAR
    pointwise: tuple[int, ...] = (10, 11)
    strides: tuple[int, ...] = ()
    scale: float = 1.0
    drop_before_pool: bool = False
    drop_rate: float = 0.0
    head_drop_rate: float = 0.0


class SimpleNet(Backbone):
    """Plain stack of `SimpleNet <https://arxiv.org/abs/1608.06037>`_.

    Every convolution is followed by batch norm and ReLU; the last map is pooled by its maximum.

    Args:
        config: which one.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.

    Shapes:
        - input: :math:`(N, C, H, W)`, at least 16 pixels along each side (ImageNet forms: 32)
        - output: :math:`(N, K)`
    """

    def __init__(
        self, config: SimpleNetConfig = SimpleNetConfig(), num_classes: int = 1000, in_chans: int = 3
    ) -> None:
        super().__init__()
        self.config = config
        self.features = nn.Sequential()
        self.feature_info = FeatureInfo()
        channels, index, reduction = in_chans, 0, 1
        for number, widths in enumerate(config.groups):
            if number:
                self.features.append(nn.MaxPool2d(2))
                self.features.append(nn.Dropout2d(config.drop_rate))
                reduction *= 2
            for place, width in enumerate(widths, 1):
                kernel = 1 if index in config.pointwise else 3
                stride = config.strides[index] if index < len(config.strides) else 1
                out = round(width * config.scale)
                self.features.append(nn.Conv2d(channels, out, kernel, stride, kernel // 2))
                self.features.append(nn.BatchNorm2d(out, momentum=0.05))
                self.features.append(nn.ReLU(inplace=True))
                if place < len(widths) or config.drop_before_pool:
                    self.features.append(nn.Dropout2d(config.drop_rate))
                channels, index, reduction = out, index + 1, reduction * stride
            module = f"features.{len(self.features) - 1}"
            self.feature_info.append(Feature(num_chs=channels, reduction=reduction, module=module))
        self.num_features = channels
        self.reset_classifier(num_classes)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw every kernel by Xavier's rule, times the gain of a ReLU."""
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight, math.sqrt(2))

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new classifier for `num_classes` in place; 0 leaves none."""
        self.num_classes = num_classes
        self.classifier = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.classifier

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """Return the last map of every group."""
        wanted = {feature["module"] for feature in self.feature_info}
        maps = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if f"features.{index}" in wanted:
                maps.append(x)
        return maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits of a feature map, or the pooled features if `pre_logits`."""
        x = F.dropout(x.amax((2, 3)), self.config.head_drop_rate, self.training)
        return x if pre_logits else self.classifier(x)


_M1, _M2 = (2, 2, 2), (2, 2, 1, 2)


def _imagenet(
    params: float | None, strides: tuple[int, ...], groups=_IMAGENET_5M, scale: float = 1.0
) -> Variant:
    config = SimpleNetConfig(groups, (10, 11), strides, scale, drop_before_pool=True)
    return Variant(SimpleNet, config, params, source="the authors' repository, Coderx7/SimpleNet_Pytorch")


def _cifar(params: float, groups: tuple[tuple[int, ...], ...]) -> Variant:
    return Variant(SimpleNet, SimpleNetConfig(groups), params, size=32, classes=10)


VARIANTS = {
    "simplenet_cifar_310k": _cifar(310e3, _CIFAR_310K),
    "simplenet_cifar_5m": _cifar(5.48e6, _CIFAR),
    "simplenetv1_small_m1_05": _imagenet(1.5e6, _M1, scale=0.5),
    "simplenetv1_small_m2_05": _imagenet(1.5e6, _M2, scale=0.5),
    # Published as 3M parameters in a file of 13 MB: one digit, coarser than the 1% to which counts are held.
    "simplenetv1_small_m1_075": _imagenet(None, _M1, scale=0.75),
    "simplenetv1_small_m2_075": _imagenet(None, _M2, scale=0.75),
    "simplenetv1_5m_m1": _imagenet(5.7e6, _M1),
    "simplenetv1_5m_m2": _imagenet(5.7e6, _M2),
    "simplenetv1_9m_m1": _imagenet(9.5e6, _M1, _IMAGENET_9M),
    "simplenetv1_9m_m2": _imagenet(9.5e6, _M2, _IMAGENET_9M),
    "simplenet_test": Variant(
        SimpleNet, SimpleNetConfig(((8, 12), (16,), (24, 16)), (3,), (2,), scale=0.75), size=32, classes=10
    ),
}
