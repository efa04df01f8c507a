"""What the Inception networks are made of: blocks of branches side by side, written down as tables.

A branch is a row of steps that follow one another. A step is `(channels, kernel)` or `(channels, kernel, stride)`, a
convolution with norm and ReLU; "avg", a 3x3 average that keeps the map; or "max", a 3x3 maximum of stride 2. What
has a stride is not padded: 35 pixels become 17, and 17 become 8.
"""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.models.backbone import Backbone, Feature, FeatureInfo

__all__ = [
    "STEM_WINDOWS", "AuxiliaryHead", "Branches", "ConvNorm", "InceptionNetwork", "Mixed", "Step", "make_step",
    "pad_to", "required_size", "scale_channels",
]  # fmt: skip

Step = Any
Branches = Mapping[str, tuple[Step, ...]]

STEM_WINDOWS = ((3, 2), (3, 1), (3, 2), (3, 1), (3, 2))
"""Kernels and strides of the unpadded layers of every deep stem: 299 pixels become 35."""


def scale_channels(channels: int, width: float) -> int:
    """Return `width` times `channels`, rounded to a multiple of 4."""
    return channels if width == 1 else max(4, round(channels * width / 4) * 4)


def required_size(*windows: tuple[int, int]) -> int:
    """Return the pixels of which unpadded windows (kernel, stride), one after another, leave one."""
    size = 1
    for kernel, stride in reversed(windows):
        size = (size - 1) * stride + kernel
    return size


def pad_to(x: Tensor, size: int) -> Tensor:
    """Return `x` with zeros around it up to `size` pixels a side; a larger image stays as it is.

    The stems are not padded, so a smaller image would end as an empty map.
    """
    height, width = (max(0, size - pixels) for pixels in x.shape[2:])
    if height == 0 and width == 0:
        return x
    return F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm and ReLU; it keeps the map unless it has a stride or is `valid`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int = 1,
        *,
        valid: bool = False,
    ) -> None:
        super().__init__()
        sides = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
        padding = (0, 0) if valid or stride > 1 else (sides[0] // 2, sides[1] // 2)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's map."""
        return self.act(self.bn(self.conv(x)))


def make_step(
    in_channels: int, step: Step, width: float = 1.0, *, count_padding: bool = False
) -> tuple[nn.Module, int]:
    """Return the module of one step of a table, and its channels.

    Args:
        in_channels: of its input.
        step: see the module.
        width: multiplies the channels of convolutions.
        count_padding: whether averages count the zeros outside the map.
    """
    if step == "avg":
        return nn.AvgPool2d(3, 1, 1, count_include_pad=count_padding), in_channels
    if step == "max":
        return nn.MaxPool2d(3, 2), in_channels
    channels, *window = step
    out = scale_channels(channels, width)
    return ConvNorm(in_channels, out, *window), out


class Mixed(nn.Module):
    r"""A block: branches that read one map and whose maps are concatenated.

    Args:
        in_channels: of the map.
        branches: the table, from names of branches to their steps.
        width: multiplies the channels of convolutions.

    Shapes:
        - input: :math:`(N, C, H, W)`
        - output: :math:`(N, C_\mathrm{out}, H', W')`, with `out_channels` channels
    """

    def __init__(self, in_channels: int, branches: Branches, width: float = 1.0) -> None:
        super().__init__()
        self.branches = tuple(branches)
        self.out_channels = 0
        for name, steps in branches.items():
            modules, channels = [], in_channels
            for step in steps:
                module, channels = make_step(channels, step, width)
                modules.append(module)
            self.add_module(name, modules[0] if len(modules) == 1 else nn.Sequential(*modules))
            self.out_channels += channels

    def forward(self, x: Tensor) -> Tensor:
        """Return the branches' maps side by side."""
        return torch.cat([self.get_submodule(name)(x) for name in self.branches], 1)


class AuxiliaryHead(nn.Module):
    """Classifier on a map in the middle of a network, which the papers add to the loss with a weight of 0.4.

    Average pooling of 5x5 windows at stride 3, a 1x1 and an unpadded 5x5 convolution, each with norm and ReLU.
    """

    def __init__(self, in_channels: int, num_classes: int, width: float = 1.0) -> None:
        super().__init__()
        reduced, hidden = scale_channels(128, width), scale_channels(768, width)
        self.pool = nn.AvgPool2d(5, 3)
        self.conv0 = ConvNorm(in_channels, reduced, 1)
        self.conv1 = ConvNorm(reduced, hidden, 5, valid=True)
        self.features = hidden
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new classifier for `num_classes` in place; 0 leaves none."""
        self.fc = nn.Linear(self.features, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, num_classes) of a map."""
        x = pad_to(x, required_size((5, 3), (5, 1)))
        x = self.conv1(self.conv0(self.pool(x)))
        return self.fc(x.mean((2, 3)))


class InceptionNetwork(Backbone):
    """What the Inception networks share: layers one after another, pooling, a classifier.

    The published networks do not pad their stems. An image of which that would leave nothing gets a border of
    zeros.
    """

    classifier: ClassVar[str] = "fc"
    """What the public weights call the classifier."""

    def assemble(
        self,
        layers: Iterable[str],
        maps: Mapping[str, tuple[int, int]],
        windows: Iterable[tuple[int, int]],
        num_classes: int,
        drop_rate: float,
    ) -> None:
        """Say what the modules made so far are, and add the head.

        Args:
            layers: names of the layers, in the order in which they run.
            maps: which of them give feature maps: their channels, and input pixels per map pixel.
            windows: kernel and stride of the unpadded layers, one after another.
            num_classes: outputs of the classifier; 0 for none.
            drop_rate: dropout before it.
        """
        self.layers = tuple(layers)
        self.feature_info = FeatureInfo(
            Feature(num_chs=channels, reduction=reduction, module=name)
            for name, (channels, reduction) in maps.items()
        )
        self.num_features = self.feature_info[-1]["num_chs"]
        self.smallest = required_size(*windows)
        self.drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new classifier for `num_classes` in place; 0 leaves none."""
        self.num_classes = num_classes
        layer = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        setattr(self, self.classifier, layer)

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.get_submodule(self.classifier)

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """Return the last map of every resolution."""
        x = pad_to(x, self.smallest)
        wanted = {feature["module"] for feature in self.feature_info}
        maps = []
        for name in self.layers:
            x = self.get_submodule(name)(x)
            if name in wanted:
                maps.append(x)
        return maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits of a feature map, or the pooled features if `pre_logits`."""
        x = self.drop(x.mean((2, 3)))
        return x if pre_logits else self.get_classifier()(x)

    def init_weights(self) -> None:
        """Draw all kernels from normal distributions of variance 2 / fan-in."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
