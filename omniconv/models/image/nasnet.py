"""NASNet: a network of cells, and a cell that is data.

Paper: Zoph et al., Learning Transferable Architectures for Scalable Image Recognition,
https://arxiv.org/abs/1707.07012. A cell has a handful of blocks; a block takes two earlier states, applies an
operation to each and joins the results. `NASNET_A` is what the paper's search found; `omniconv.design.nas.controller`
is the search. Parameter names are those of the public weights.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.layers.conv.separable import SeparableConv2d
from omniconv.layers.scheduled_drop_path import ScheduledDropPath
from omniconv.models.backbone import Backbone, Feature, FeatureInfo, Variant
from omniconv.models.image.inception import AuxiliaryHead

__all__ = ["NASNET_A", "OPERATIONS", "Block", "CellSpec", "Genotype", "NASNet", "NASNetCell", "NASNetConfig"]

OPERATIONS = (
    "identity", "conv_1x3_3x1", "conv_1x7_7x1", "avg_pool_3", "max_pool_3", "max_pool_5", "max_pool_7",
    "conv_1", "conv_3", "dil_conv_3", "sep_conv_3", "sep_conv_5", "sep_conv_7",
)  # fmt: skip
"""The search space's operations; the last number is the kernel's side."""


class Block(NamedTuple):
    """Two operations on two earlier states, joined to a new state.

    Attributes:
        left_op, right_op: names of `OPERATIONS`.
        left, right: what they are applied to: 0 is the cell before the last, 1 the last, 2 the first block's
            state, and so on.
        join: "add", or "concat", which doubles the channels.
    """

    left_op: str
    left: int
    right_op: str
    right: int
    join: Literal["add", "concat"] = "add"


class CellSpec(NamedTuple):
    """A cell: its blocks, and the states that are concatenated to its output; if empty, all that no block reads."""

    blocks: tuple[Block, ...]
    concat: tuple[int, ...] = ()

    @property
    def outputs(self) -> tuple[int, ...]:
        """The states that are concatenated."""
        read = {state for block in self.blocks for state in (block.left, block.right)}
        return self.concat or tuple(state for state in range(2 + len(self.blocks)) if state not in read)


class Genotype(NamedTuple):
    """A network's two cells: the one that keeps the map's size, and the one that halves it."""

    normal: CellSpec
    reduction: CellSpec


NASNET_A = Genotype(
    CellSpec(
        (
            Block("sep_conv_5", 1, "sep_conv_3", 0),
            Block("sep_conv_5", 0, "sep_conv_3", 0),
            Block("avg_pool_3", 1, "identity", 0),
            Block("avg_pool_3", 0, "avg_pool_3", 0),
            Block("sep_conv_3", 1, "identity", 1),
        ),
        (0, 2, 3, 4, 5, 6),
    ),
    CellSpec(
        (
            Block("sep_conv_5", 1, "sep_conv_7", 0),
            Block("max_pool_3", 1, "sep_conv_7", 0),
            Block("avg_pool_3", 1, "sep_conv_5", 0),
            Block("identity", 3, "avg_pool_3", 2),
            Block("sep_conv_3", 2, "max_pool_3", 1),
        ),
        (3, 4, 5, 6),
    ),
)


@dataclass(frozen=True)
class NASNetConfig:
    """What tells one NASNet from another.

    Attributes:
        cells: N, normal cells of each of the three stages.
        channels: of the operations in the first stage; they double at each reduction. NASNet-A puts out 24 times
            as many, by which the paper calls it: 6 @ 4032 has 168.
        stem_width: channels of the first convolution.
        stem: "reduce" (stride 2 and two reduction cells), or "keep" for images of about 32 pixels.
        skip_reduction: the cell after a reduction reads not the two cells before it, but the reduction and the
            cell before the last one before that.
        genotype: the cells.
        aux: an auxiliary head before the last reduction, for `forward_with_aux`.
        drop_rate: dropout before the classifier.
        drop_path_rate: probability with which paths of the last cell are dropped at the end of the training;
            rises linearly over the cells, and with `set_progress` over the training.
    """

    cells: int = 6
    channels: int = 168
    stem_width: int = 96
    stem: Literal["reduce", "keep"] = "reduce"
    skip_reduction: bool = False
    genotype: Genotype = NASNET_A
    aux: bool = False
    drop_rate: float = 0.5
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        # A genotype read from JSON is nested lists.
        cells = (
            CellSpec(tuple(Block(*b) for b in blocks), tuple(concat)) for blocks, concat in self.genotype
        )
        object.__setattr__(self, "genotype", Genotype(*cells))
        for cell in self.genotype:
            for number, block in enumerate(cell.blocks, 2):
                if not {block.left_op, block.right_op} <= set(OPERATIONS):
                    raise ValueError(f"operations must be of {OPERATIONS}: got {block}")
                if not (0 <= block.left < number and 0 <= block.right < number):
                    raise ValueError(f"the block of state {number} must read earlier states: got {block}")


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class ActConvNorm(nn.Module):
    """ReLU, convolution, norm."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.act = nn.ReLU()
        self.conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
        self.bn = _norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's map."""
        return self.bn(self.conv(self.act(x)))


class TwiceSeparable(nn.Module):
    """ReLU, separable convolution and norm, twice; the first one carries the stride."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        names = ("depthwise_conv2d", "pointwise_conv2d")
        self.act_1 = nn.ReLU()
        self.separable_1 = SeparableConv2d(
            in_channels, out_channels, kernel_size, stride, padding="same", names=names
        )
        self.bn_sep_1 = _norm(out_channels)
        self.act_2 = nn.ReLU(inplace=True)
        self.separable_2 = SeparableConv2d(out_channels, out_channels, kernel_size, names=names)
        self.bn_sep_2 = _norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's map."""
        x = self.act_2(self.bn_sep_1(self.separable_1(self.act_1(x))))
        return self.bn_sep_2(self.separable_2(x))


class SamePool(nn.Module):
    """Pooling to ceil(size / 2) pixels; an odd pixel of padding goes to the end, as in TensorFlow.

    As in the public weights' PyTorch form, averages count the padding, which TensorFlow's do not.
    """

    def __init__(self, kind: str, kernel_size: int) -> None:
        super().__init__()
        self.kind, self.kernel_size = kind, kernel_size

    def forward(self, x: Tensor) -> Tensor:
        """Pool `x`."""
        down, across = (self.kernel_size - 1 - (pixels - 1) % 2 for pixels in x.shape[2:])
        borders = (across // 2, across - across // 2, down // 2, down - down // 2)
        if self.kind == "max":
            return F.max_pool2d(F.pad(x, borders, value=-torch.inf), self.kernel_size, 2)
        return F.avg_pool2d(F.pad(x, borders), self.kernel_size, 2)


def make_operation(name: str, in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Return an operation of the search space that gives `out_channels`."""
    kind, _, kernel = name.rpartition("_")
    if name == "identity":
        same = stride == 1 and in_channels == out_channels
        return nn.Identity() if same else ActConvNorm(in_channels, out_channels, stride)
    if kind == "sep_conv":
        return TwiceSeparable(in_channels, out_channels, int(kernel), stride)
    if kind.endswith("pool"):
        side = int(kernel)
        if stride == 2:
            pool: nn.Module = SamePool(kind[:3], side)
        elif kind == "max_pool":
            pool = nn.MaxPool2d(side, 1, side // 2)
        else:
            pool = nn.AvgPool2d(side, 1, side // 2, count_include_pad=False)
        if in_channels == out_channels:
            return pool
        return nn.Sequential(pool, nn.Conv2d(in_channels, out_channels, 1, bias=False), _norm(out_channels))

    if name.startswith("conv_1x"):
        side = int(name[-3])
        kernels, dilation = ((1, side), (side, 1)), 1
    else:
        side, dilation = int(kernel), 2 if kind == "dil_conv" else 1
        kernels = ((side, side),)
    layers: list[nn.Module] = []
    channels = in_channels
    for window in kernels:
        padding = (dilation * (window[0] // 2), dilation * (window[1] // 2))
        conv = nn.Conv2d(channels, out_channels, window, stride, padding, dilation, bias=False)
        layers += [nn.ReLU(), conv, _norm(out_channels)]
        channels, stride = out_channels, 1
    return nn.Sequential(*layers)


class NASNetCell(nn.Module):
    """A cell of `NASNet <https://arxiv.org/abs/1707.07012>`_, built from its description.

    Args:
        spec: the cell.
        channels: that every operation puts out.
        in_channels: of the last cell's map.
        previous_channels: of the map of the cell before.
        reduction: halve the map: operations on states 0 and 1 get stride 2.
        previous: how the map of the cell before becomes state 0: by a 1x1 convolution ("conv"), by two, one
            of every second pixel and one of those between, where that map is twice as large ("halve"),
            or not at all ("raw").
        drop: probability with which paths are dropped at the end of the training.

    Shapes:
        - inputs: the last cell's map and the one before
        - output: :math:`(N, C, H, W)` with `out_channels` channels
    """

    def __init__(
        self,
        spec: CellSpec,
        channels: int,
        in_channels: int,
        previous_channels: int,
        *,
        reduction: bool = False,
        previous: Literal["conv", "halve", "raw"] = "conv",
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.spec, self.previous = spec, previous
        counts = [channels, channels]
        if previous == "conv":
            self.conv_prev_1x1 = ActConvNorm(previous_channels, channels)
        elif previous == "halve":
            self.act = nn.ReLU()
            half = channels // 2
            widths = {"path_1": half, "path_2": channels - half}
            for name, width in widths.items():
                conv = nn.Conv2d(previous_channels, width, 1, bias=False)
                self.add_module(name, nn.Sequential(OrderedDict(conv=conv)))
            self.final_path_bn = _norm(channels)
        else:
            counts[0] = previous_channels
        self.conv_1x1 = ActConvNorm(in_channels, channels)

        for number, block in enumerate(spec.blocks):
            sides = {"left": (block.left_op, block.left), "right": (block.right_op, block.right)}
            for side, (name, state) in sides.items():
                stride = 2 if reduction and state < 2 else 1
                operation = make_operation(name, counts[state], channels, stride)
                self.add_module(f"comb_iter_{number}_{side}", operation)
            counts.append(channels if block.join == "add" else 2 * channels)
        # A reduction's unread inputs are halved before they are put out.
        self.halved = [state for state in spec.outputs if reduction and state < 2]
        for state in self.halved:
            self.add_module(f"halve_{state}", ActConvNorm(counts[state], channels, 2))
            counts[state] = channels
        self.out_channels = sum(counts[state] for state in spec.outputs)
        self.drop_path = ScheduledDropPath(drop)

    def adapt(self, x: Tensor) -> Tensor:
        """Return state 0 of the map of the cell before."""
        if self.previous == "conv":
            return self.conv_prev_1x1(x)
        if self.previous == "raw":
            return x
        x = self.act(x)
        # Every second pixel, and those between; a convolution's own stride costs the same, but its gradient into
        # `cat` overruns memory in channels-last (torch 2.13 on CPUs).
        first, second = x[:, :, ::2, ::2], F.pad(x, (0, 1, 0, 1))[:, :, 1::2, 1::2]
        paths = [self.get_submodule("path_1")(first), self.get_submodule("path_2")(second)]
        return self.final_path_bn(torch.cat(paths, 1))

    def path(self, name: str, x: Tensor) -> Tensor:
        """Apply an operation and drop its result, unless it is the identity."""
        operation = self.get_submodule(name)
        return x if isinstance(operation, nn.Identity) else self.drop_path(operation(x))

    def forward(self, x: Tensor, previous: Tensor) -> Tensor:
        """Return the cell's map from those of the last cell and the one before."""
        states = [self.adapt(previous), self.conv_1x1(x)]
        for number, block in enumerate(self.spec.blocks):
            left = self.path(f"comb_iter_{number}_left", states[block.left])
            right = self.path(f"comb_iter_{number}_right", states[block.right])
            states.append(left + right if block.join == "add" else torch.cat([left, right], 1))
        for state in self.halved:
            states[state] = self.get_submodule(f"halve_{state}")(states[state])
        return torch.cat([states[state] for state in self.spec.outputs], 1)


class StemConv(nn.Module):
    """The first convolution, unpadded where it has a stride, and its norm."""

    def __init__(self, in_chans: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, channels, 3, stride, 1 if stride == 1 else 0, bias=False)
        self.bn = _norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's map."""
        return self.bn(self.conv(x))


class NASNet(Backbone):
    """Network of cells of `NASNet <https://arxiv.org/abs/1707.07012>`_.

    Args:
        config: which one.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.

    Shapes:
        - input: :math:`(N, C, H, W)`
        - output: :math:`(N, K)`
    """

    def __init__(
        self, config: NASNetConfig = NASNetConfig(), num_classes: int = 1000, in_chans: int = 3
    ) -> None:
        super().__init__()
        self.config = config
        reducing = config.stem == "reduce"
        # (name of the module, channels of its operations, whether it halves)
        plan = []
        if reducing:
            plan = [("cell_stem_0", config.channels // 4, True), ("cell_stem_1", config.channels // 2, True)]
        for stage in range(3):
            channels = config.channels * 2**stage
            if stage > 0:
                plan.append((f"reduction_cell_{stage - 1}", channels, True))
            first = stage * config.cells
            plan += [(f"cell_{first + index}", channels, False) for index in range(config.cells)]

        stride = 2 if reducing else 1
        self.conv0 = StemConv(in_chans, config.stem_width, stride)
        self.feature_info = FeatureInfo()
        if reducing:
            self.feature_info.append(Feature(num_chs=config.stem_width, reduction=2, module="conv0"))
        # Of every map so far: channels, and input pixels per map pixel.
        made = [(config.stem_width, stride)] * 2
        self.sources: list[tuple[str, int, int]] = []
        for index, (name, channels, halves) in enumerate(plan):
            last, previous = len(made) - 1, len(made) - 2
            if config.skip_reduction and index > 0 and plan[index - 1][0].startswith("reduction"):
                previous -= 1
            kind = "halve" if made[previous][1] < made[last][1] else "conv"
            spec = config.genotype.reduction if halves else config.genotype.normal
            cell = NASNetCell(
                spec, channels, made[last][0], made[previous][0],
                reduction=halves, previous="raw" if index == 0 else kind,
                drop=config.drop_path_rate * (index + 1) / len(plan),
            )  # fmt: skip
            self.add_module(name, cell)
            self.sources.append((name, last, previous))
            if halves and index > 0:
                self._describe(*made[last], f"{name}.conv_1x1.act")
            made.append((cell.out_channels, made[last][1] * (2 if halves else 1)))
        self.act = nn.ReLU()
        self._describe(*made[-1], "act")
        self.num_features = made[-1][0]
        self.AuxLogits = AuxiliaryHead(self.feature_info[-2]["num_chs"], num_classes) if config.aux else None
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(config.drop_rate)
        self.reset_classifier(num_classes)
        self.init_weights()

    def _describe(self, channels: int, reduction: int, module: str) -> None:
        self.feature_info.append(Feature(num_chs=channels, reduction=reduction, module=module))

    def init_weights(self) -> None:
        """Draw all kernels from normal distributions of variance 2 / fan-in."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def reset_classifier(self, num_classes: int) -> None:
        """Put new classifiers for `num_classes` in place; 0 leaves none."""
        self.num_classes = num_classes
        self.last_linear = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        if self.AuxLogits is not None:
            self.AuxLogits.reset_classifier(num_classes)

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.last_linear

    def set_progress(self, progress: float) -> None:
        """Tell every drop path the part of the training that is done, in [0, 1]."""
        for module in self.modules():
            if isinstance(module, ScheduledDropPath):
                module.set_progress(progress)

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """Return the last map of every resolution, after its ReLU."""
        wanted = {feature["module"] for feature in self.feature_info}
        x = self.conv0(x)
        maps = [x] if "conv0" in wanted else []
        made = [x, x]
        for name, last, previous in self.sources:
            cell = self.get_submodule(name)
            if f"{name}.conv_1x1.act" in wanted:
                maps.append(cell.get_submodule("conv_1x1.act")(made[last]))
            made.append(cell(made[last], made[previous]))
        maps.append(self.act(made[-1]))
        return maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits of a feature map, or the pooled features if `pre_logits`."""
        x = self.drop(self.global_pool(x).flatten(1))
        return x if pre_logits else self.last_linear(x)

    def forward_with_aux(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits and those of the auxiliary head, whose loss training adds with a weight of 0.4.

        Raises:
            ValueError: if the network was made without `aux=True`.
        """
        if self.AuxLogits is None:
            raise ValueError("this network has no auxiliary head; make it with aux=True")
        maps = self.forward_stages(x)
        return self.forward_head(maps[-1]), self.AuxLogits(maps[-2])


_SMALL = Genotype(
    CellSpec((Block("sep_conv_3", 1, "identity", 0), Block("avg_pool_3", 2, "conv_1", 0, "concat"))),
    CellSpec((Block("sep_conv_3", 1, "max_pool_3", 0), Block("avg_pool_3", 1, "identity", 2))),
)

VARIANTS = {
    "nasnetalarge": Variant(NASNet, NASNetConfig(skip_reduction=True), 88.9e6, 23.8e9, 331),
    "nasnetamobile": Variant(NASNet, NASNetConfig(4, 44, 32), 5.3e6, 564e6),
    "nasneta_cifar": Variant(
        NASNet, NASNetConfig(6, 32, 96, "keep"), 3.3e6, size=32, classes=10
    ),
    "nasnet_test": Variant(
        NASNet,
        NASNetConfig(1, 8, 8, "keep", skip_reduction=True, genotype=_SMALL, drop_path_rate=0.2),
        size=32, classes=10,
    ),
}  # fmt: skip
