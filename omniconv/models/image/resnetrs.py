"""ResNet-RS: an ordinary ResNet, with today's training and scaled with care.

Paper: Bello et al., Revisiting ResNets: Improved Training and Scaling Strategies, https://arxiv.org/abs/2103.07579.
The networks are configurations of `omniconv.models.image.resnet`: deep stem, a strided convolution for its pooling,
average-pooled shortcuts, and squeeze-and-excitation with r = 4. Their recipes, and the rule by which they grow, are
here too.
"""

from dataclasses import dataclass, replace
from functools import partial

from omniconv.models.backbone import Variant
from omniconv.models.image.resnet import ResNet
from omniconv.models.image.resnet_blocks import ResNetConfig

__all__ = ["RECIPES", "Recipe", "scale"]


@dataclass(frozen=True)
class Recipe:
    """How a network of the paper is trained; regularisation grows with network and resolution.

    Attributes:
        model: name in `VARIANTS`.
        resolution: image side in pixels.
        randaugment: magnitude of RandAugment.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block.
        label_smoothing: share of a label that the other classes get.
        weight_decay: L2 penalty, halved by convention; less than the usual 1e-4, as there is other regularisation.
        ema: decay a step of the averaged weights that are used in the end.
        epochs: of ImageNet, with a cosine schedule.
    """

    model: str
    resolution: int
    randaugment: int
    drop_rate: float
    drop_path_rate: float
    label_smoothing: float = 0.1
    weight_decay: float = 4e-5
    ema: float = 0.9999
    epochs: int = 350


RECIPES = (
    Recipe("resnetrs50", 160, 10, 0.25, 0.0),
    Recipe("resnetrs101", 160, 10, 0.25, 0.0),
    Recipe("resnetrs101", 192, 15, 0.25, 0.0),
    Recipe("resnetrs152", 192, 15, 0.25, 0.0),
    Recipe("resnetrs152", 224, 15, 0.25, 0.0),
    Recipe("resnetrs152", 256, 15, 0.25, 0.0),
    Recipe("resnetrs200", 256, 15, 0.25, 0.1),
    Recipe("resnetrs270", 256, 15, 0.25, 0.1),
    Recipe("resnetrs350", 256, 15, 0.25, 0.1),
    Recipe("resnetrs350", 320, 15, 0.4, 0.1),
    Recipe("resnetrs420", 320, 15, 0.4, 0.1),
)
"""The paper's eleven networks and resolutions, with the settings of the authors' configuration files."""


def scale(config: ResNetConfig, factor: float, *, overfits: bool) -> ResNetConfig:
    """Return a network of about `factor` times the operations, grown as the paper's first strategy says.

    Args:
        config: the network to grow.
        factor: of its multiply-adds; above 1.
        overfits: whether training is so long that the network can overfit (hundreds of epochs of ImageNet). Then
            depth is worth most; otherwise width is, by which operations grow quadratically. The second strategy,
            to raise the resolution more slowly than depth and width, is the caller's.

    Raises:
        ValueError: if `factor` is not above 1.
    """
    if factor <= 1:
        raise ValueError(f"factor must be above 1: got {factor}")
    if overfits:
        return replace(config, depths=tuple(max(1, round(depth * factor)) for depth in config.depths))
    return replace(config, widths=tuple(round(width * factor**0.5 / 8) * 8 for width in config.widths))


_rs = partial(ResNetConfig, stem="rs", shortcut="pool", gate="se", gate_reduction=4, drop_rate=0.25)


def _row(
    config: ResNetConfig, params: float, macs: float, size: int, source: str = "timm's model cards"
) -> Variant:
    return Variant(ResNet, config, params, macs, size=size, source=source)


# The paper counts a multiply-add as two operations.
VARIANTS = {
    "resnetrs50": _row(_rs((3, 4, 6, 3)), 35.692e6, 4.6e9 / 2, 160),
    "resnetrs101": _row(_rs((3, 4, 23, 3)), 63.619e6, 12e9 / 2, 192),
    "resnetrs152": _row(_rs((3, 8, 36, 3)), 86.622e6, 31e9 / 2, 256),
    "resnetrs200": _row(_rs((3, 24, 36, 3), drop_path_rate=0.1), 93.21e6, 40e9 / 2, 256),
    "resnetrs270": _row(_rs((4, 29, 53, 4), drop_path_rate=0.1), 130e6, 54e9 / 2, 256, ""),
    "resnetrs350": _row(_rs((4, 36, 72, 4), drop_rate=0.4, drop_path_rate=0.1), 164e6, 107e9 / 2, 320, ""),
    "resnetrs420": _row(_rs((4, 44, 87, 4), drop_rate=0.4, drop_path_rate=0.1), 191.892e6, 128e9 / 2, 320),
}
