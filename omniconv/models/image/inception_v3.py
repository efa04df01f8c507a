"""Inception-v3: large kernels replaced by stacks of small and of one-dimensional ones.

Paper: Szegedy et al., Rethinking the Inception Architecture for Computer Vision, https://arxiv.org/abs/1512.00567.
Its other two ideas are `omniconv.losses.label_smoothing` and the auxiliary head with batch norm. What a
replacement saves is `omniconv.design.factorize`. Parameter names are those of the public weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from string import ascii_lowercase
from typing import Literal

import torch
from torch import Tensor, nn

from omniconv.models.backbone import Variant
from omniconv.models.image.inception import (
    STEM_WINDOWS,
    AuxiliaryHead,
    ConvNorm,
    InceptionNetwork,
    Step,
    make_step,
    scale_channels,
)

__all__ = ["InceptionV3", "InceptionV3Config"]


@dataclass(frozen=True)
class InceptionV3Config:
    """What tells one Inception-v3 from another.

    Attributes:
        pools: the blocks at 35 pixels, each by the channels of its pooled branch.
        inner: the blocks at 17 pixels, each by the channels inside its 1x7 and 7x1 branches.
        last: number of blocks at 8 pixels.
        width: multiplies all channels.
        stem: "deep" (three halvings, unpadded), or one "3x3" convolution of stride 1 for images of about 32 pixels.
        aux: an auxiliary head on the last map of 17 pixels, for `forward_with_aux`.
        drop_rate: dropout before the classifier.
    """

    pools: tuple[int, ...] = (32, 64, 64)
    inner: tuple[int, ...] = (128, 160, 160, 192)
    last: int = 2
    width: float = 1.0
    stem: Literal["deep", "3x3"] = "deep"
    aux: bool = False
    drop_rate: float = 0.2

    def __post_init__(self) -> None:
        if not self.pools or not self.inner or self.last < 1:
            raise ValueError(
                f"every stage needs a block: got pools={self.pools}, inner={self.inner}, last={self.last}"
            )


Table = Sequence[Mapping[str, Step]]
"""A block's branches, each from the names of its layers to their steps."""


class FlatMixed(nn.Module):
    """A block whose branches' layers stand side by side in the state dict.

    A step may fork, `(step, step)`: both layers, "a" and "b", read the same map, and both maps go on. This is the
    expanded filter bank of figure 7.
    """

    def __init__(self, in_channels: int, table: Table, width: float) -> None:
        super().__init__()
        self.chains: list[list[list[str]]] = []
        self.out_channels = 0
        for branch in table:
            channels = in_channels
            self.chains.append([])
            for name, step in branch.items():
                forked = isinstance(step[0], tuple)
                parts = {f"{name}a": step[0], f"{name}b": step[1]} if forked else {name: step}
                outputs = 0
                for part, inner in parts.items():
                    module, out = make_step(channels, inner, width, count_padding=True)
                    self.add_module(part, module)
                    outputs += out
                channels = outputs
                self.chains[-1].append(list(parts))
            self.out_channels += channels

    def forward(self, x: Tensor) -> Tensor:
        """Return the branches' maps side by side."""
        maps = []
        for chain in self.chains:
            y = x
            for names in chain:
                outputs = [self.get_submodule(name)(y) for name in names]
                y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
            maps.append(y)
        return torch.cat(maps, 1)


def _inception_a(pooled: int) -> Table:
    return (
        {"branch1x1": (64, 1)},
        {"branch5x5_1": (48, 1), "branch5x5_2": (64, 5)},
        {"branch3x3dbl_1": (64, 1), "branch3x3dbl_2": (96, 3), "branch3x3dbl_3": (96, 3)},
        {"pool": "avg", "branch_pool": (pooled, 1)},
    )


_INCEPTION_B: Table = (
    {"branch3x3": (384, 3, 2)},
    {"branch3x3dbl_1": (64, 1), "branch3x3dbl_2": (96, 3), "branch3x3dbl_3": (96, 3, 2)},
    {"pool": "max"},
)


def _inception_c(inner: int) -> Table:
    across, down = (inner, (1, 7)), (inner, (7, 1))
    return (
        {"branch1x1": (192, 1)},
        {"branch7x7_1": (inner, 1), "branch7x7_2": across, "branch7x7_3": (192, (7, 1))},
        {
            "branch7x7dbl_1": (inner, 1),
            "branch7x7dbl_2": down,
            "branch7x7dbl_3": across,
            "branch7x7dbl_4": down,
            "branch7x7dbl_5": (192, (1, 7)),
        },
        {"pool": "avg", "branch_pool": (192, 1)},
    )


_INCEPTION_D: Table = (
    {"branch3x3_1": (192, 1), "branch3x3_2": (320, 3, 2)},
    {
        "branch7x7x3_1": (192, 1),
        "branch7x7x3_2": (192, (1, 7)),
        "branch7x7x3_3": (192, (7, 1)),
        "branch7x7x3_4": (192, 3, 2),
    },
    {"pool": "max"},
)

_FORK = ((384, (1, 3)), (384, (3, 1)))
_INCEPTION_E: Table = (
    {"branch1x1": (320, 1)},
    {"branch3x3_1": (384, 1), "branch3x3_2": _FORK},
    {"branch3x3dbl_1": (448, 1), "branch3x3dbl_2": (384, 3), "branch3x3dbl_3": _FORK},
    {"pool": "avg", "branch_pool": (192, 1)},
)


class InceptionV3(InceptionNetwork):
    """Network of `Rethinking the Inception Architecture <https://arxiv.org/abs/1512.00567>`_.

    Images smaller than 75 pixels, of which the unpadded layers would leave nothing, get a border of zeros.

    Args:
        config: which one.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.

    Shapes:
        - input: :math:`(N, C, H, W)`
        - output: :math:`(N, K)`
    """

    def __init__(
        self, config: InceptionV3Config = InceptionV3Config(), num_classes: int = 1000, in_chans: int = 3
    ) -> None:
        super().__init__()
        self.config = config
        scaled = partial(scale_channels, width=config.width)
        channels, reduction = scaled(192), 1
        layers: dict[str, nn.Module] = {"Conv2d_1a_3x3": ConvNorm(in_chans, channels, 3)}
        maps: dict[str, tuple[int, int]] = {}
        if config.stem == "deep":
            layers = {
                "Conv2d_1a_3x3": ConvNorm(in_chans, scaled(32), 3, 2),
                "Conv2d_2a_3x3": ConvNorm(scaled(32), scaled(32), 3, valid=True),
                "Conv2d_2b_3x3": ConvNorm(scaled(32), scaled(64), 3),
                "Pool1": nn.MaxPool2d(3, 2),
                "Conv2d_3b_1x1": ConvNorm(scaled(64), scaled(80), 1),
                "Conv2d_4a_3x3": ConvNorm(scaled(80), channels, 3, valid=True),
                "Pool2": nn.MaxPool2d(3, 2),
            }
            maps = {"Conv2d_2b_3x3": (scaled(64), 2), "Conv2d_4a_3x3": (channels, 4)}
            reduction = 8

        stages = (
            ("Mixed_5", ascii_lowercase[1:], [_inception_a(pooled) for pooled in config.pools]),
            ("Mixed_6", ascii_lowercase, [_INCEPTION_B, *map(_inception_c, config.inner)]),
            ("Mixed_7", ascii_lowercase, [_INCEPTION_D, *[_INCEPTION_E] * config.last]),
        )
        for stage, letters, tables in stages:
            for index, table in enumerate(tables):
                block = FlatMixed(channels, table, config.width)
                channels = block.out_channels
                layers[f"{stage}{letters[index]}"] = block
            maps[list(layers)[-1]] = (channels, reduction)
            reduction *= 2
        for name, layer in layers.items():
            self.add_module(name, layer)
        middle = list(maps.values())[-2][0]
        self.AuxLogits = AuxiliaryHead(middle, num_classes, config.width) if config.aux else None
        windows = STEM_WINDOWS if config.stem == "deep" else ()
        self.assemble(layers, maps, (*windows, (3, 2), (3, 2)), num_classes, config.drop_rate)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw all weights from a normal distribution of deviation 0.1, cut at two deviations."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.1, a=-0.2, b=0.2)

    def reset_classifier(self, num_classes: int) -> None:
        """Put new classifiers for `num_classes` in place; 0 leaves none."""
        super().reset_classifier(num_classes)
        if self.AuxLogits is not None:
            self.AuxLogits.reset_classifier(num_classes)

    def forward_with_aux(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits and those of the auxiliary head, whose loss training adds with a weight of 0.4.

        Raises:
            ValueError: if the network was made without `aux=True`.
        """
        if self.AuxLogits is None:
            raise ValueError("this network has no auxiliary head; make it with aux=True")
        maps = self.forward_stages(x)
        return self.forward_head(maps[-1]), self.AuxLogits(maps[-2])


VARIANTS = {
    "inception_v3": Variant(InceptionV3, InceptionV3Config(), 23_834_568, 5.73e9, 299, source="torchvision"),
    "inception_v3_test": Variant(
        InceptionV3, InceptionV3Config((32,), (128,), 1, width=0.04, stem="3x3"), size=32, classes=10
    ),
}
