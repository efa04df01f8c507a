"""QLNet: a residual network as a quasi-linear hyperbolic system, with a continuous symmetry.

Paper: Liu et al., https://arxiv.org/abs/2308.01621. Inside a block stands a product where others have an activation;
the only other nonlinearity, a projection to a ball, stands where the map shrinks. So 1x1 convolutions alone touch the
residual stream, and the channels of the stream may be written in any basis (`change_basis`). Parameter names are those
of the official code.
"""

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from omniconv.layers.conv.reparam import fuse_conv_bn
from omniconv.models.backbone import Backbone, Feature, FeatureInfo, Variant

__all__ = ["BallProjection", "QLBlock", "QLNet", "QLNetConfig", "change_basis"]


@dataclass(frozen=True)
class QLNetConfig:
    """What tells one QLNet from another.

    Attributes:
        depths: blocks a stage.
        widths: channels of each stage's stream.
        wide_until: blocks that up to so many channels enter have a product of four times as many, others of twice.
        multiplier: kernels a channel of the product in the depthwise convolution.
        act: what ends the first block of each stage but the first: "ball" (the projection to a ball, which any
            rotation leaves as it is) or "relu".
        stem: "7x7" (stride 2, then max pooling) or "3x3" (stride 1 and no pooling, for images of about 32 pixels).
        drop_rate: dropout before the classifier.
    """

    depths: tuple[int, ...] = (3, 4, 6, 3)
    widths: tuple[int, ...] = (64, 128, 256, 512)
    wide_until: int = 128
    multiplier: int = 2
    act: Literal["ball", "relu"] = "ball"
    stem: Literal["7x7", "3x3"] = "7x7"
    drop_rate: float = 0.0

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.widths):
            raise ValueError(f"depths and widths must be equally long: got {self.depths} and {self.widths}")


class ConvNorm(nn.Module):
    """1x1 convolution and batch norm; `deploy()` merges them into one convolution."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normed convolution."""
        return self.bn(self.conv(x))

    def merged(self) -> nn.Conv2d:
        """Return the convolution with bias that equals this module in eval mode."""
        conv = copy.deepcopy(self.conv)
        weight, bias = fuse_conv_bn(conv.weight, None, self.bn)
        conv.weight, conv.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
        return conv


class BallProjection(nn.Module):
    r"""Every pixel's vector of C channels, brought back to the ball of radius :math:`\sqrt C` if it lies outside.

    .. math:: y = x \cdot \min(1, \sqrt C / \|x\|)
    """

    def forward(self, x: Tensor) -> Tensor:
        """Project every pixel of `x`."""
        square = (x * x).sum(1, keepdim=True)
        return x * (x.shape[1] / square.clamp(min=x.shape[1])).sqrt()


class QLBlock(nn.Module):
    r"""Step of a quasi-linear system :math:`u_t = \sum_i A_i(u)\, \partial_i u`.

    .. math:: y = S x + W_3\, \mathrm{BN}\bigl(D * (W_1 x \odot W_1' x)\bigr)

    where D is a depthwise 3x3 convolution, a differential operator of order two at most, and S the identity where
    shapes do not change.

    Args:
        in_channels, out_channels: channels of the stream before and after.
        config: which network.
        stride: of D and S.
        widen: end with a 1x1 shortcut and the nonlinearity.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        config: QLNetConfig,
        stride: int,
        widen: bool,
    ) -> None:
        super().__init__()
        width = in_channels * (4 if in_channels <= config.wide_until else 2)
        wide = width * config.multiplier
        self.conv1: nn.Module = ConvNorm(in_channels, 2 * width)
        self.conv2 = nn.Conv2d(width, wide, 3, stride, 1, groups=width, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.conv3: nn.Module = ConvNorm(wide, out_channels)
        self.skip: nn.Module = ConvNorm(in_channels, out_channels, stride) if widen else nn.Identity()
        self.act3: nn.Module = nn.Identity()
        if widen:
            self.act3 = BallProjection() if config.act == "ball" else nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        left, right = self.conv1(x).chunk(2, 1)
        return self.act3(self.skip(x) + self.conv3(self.bn2(self.conv2(left * right))))


class QLNet(Backbone):
    """Network of `QLNet <https://arxiv.org/abs/2308.01621>`_.

    Args:
        config: which one.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.

    Shapes:
        - input: :math:`(N, C, H, W)`
        - output: :math:`(N, K)`
    """

    def __init__(self, config: QLNetConfig, num_classes: int = 1000, in_chans: int = 3) -> None:
        super().__init__()
        self.config = config
        channels, small = config.widths[0], config.stem == "3x3"
        kernel, stride = (3, 1) if small else (7, 2)
        self.conv1 = nn.Conv2d(in_chans, channels, kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = nn.ReLU()
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        self.feature_info = FeatureInfo([Feature(num_chs=channels, reduction=stride, module="act1")])
        reduction = 1 if small else 4
        for stage, (depth, width) in enumerate(zip(config.depths, config.widths, strict=True)):
            blocks = []
            for index in range(depth):
                widen = stage > 0 and index == 0
                blocks.append(QLBlock(channels, width, config, 1 + widen, widen))
                channels = width
            reduction *= 2 if stage else 1
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
            self.feature_info.append(Feature(num_chs=width, reduction=reduction, module=f"layer{stage + 1}"))
        self.act = BallProjection() if config.act == "ball" else nn.ReLU()
        self.num_features = channels
        self.drop = nn.Dropout(config.drop_rate)
        self.reset_classifier(num_classes)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw convolutions that keep the variance of gradients, and start every residual branch at zero."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="linear")
        for module in self.modules():
            if isinstance(module, QLBlock):
                nn.init.zeros_(module.conv3.get_parameter("bn.weight"))

    def blocks(self) -> list[QLBlock]:
        """Return all blocks, in the order in which they run."""
        return [module for module in self.modules() if isinstance(module, QLBlock)]

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new classifier for `num_classes` in place; 0 leaves none."""
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.fc

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """Return the stem's and every stage's feature map."""
        maps = [self.act1(self.bn1(self.conv1(x)))]
        x = self.maxpool(maps[0])
        for stage in range(len(self.config.depths)):
            x = self.get_submodule(f"layer{stage + 1}")(x)
            maps.append(x)
        return maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits of a feature map, or the pooled features of the ball if `pre_logits`."""
        x = self.drop(self.act(x).mean((2, 3)))
        return x if pre_logits else self.fc(x)


@torch.no_grad()
def change_basis(model: QLNet, first: int, last: int, matrix: Tensor) -> QLNet:
    r"""Return a network with other weights and the same outputs, whose stream between two blocks is :math:`Q u`.

    .. math:: W_3 \to Q W_3, \quad S \to Q S \ \text{(block `first`)}, \qquad
              W_1 \to W_1 Q^{-1}, \quad S \to S Q^{-1} \ \text{(block `last`)}

    and both for the blocks between, whose shortcut stays the identity. Identity shortcuts of the two ends become 1x1
    convolutions.

    Args:
        model: a QLNet; it is left as it is. The result is in eval mode, its norms merged into 1x1 convolutions.
        first: the block, counted over the whole network, whose output is written anew.
        last: a later block, of the same stage or the first one of the next, that reads it.
        matrix: Q, (C, C), invertible; orthogonal where block `first` ends with the projection to the ball.

    Raises:
        ValueError: if the blocks do not share one stream, or Q does not fit it.
    """
    model = model.deploy()
    blocks = model.blocks()
    if not 0 <= first < last < len(blocks):
        raise ValueError(
            f"first and last must be blocks 0 <= first < last < {len(blocks)}: got {first}, {last}"
        )
    between = blocks[first + 1 : last]
    if not all(isinstance(block.skip, nn.Identity) for block in between):
        raise ValueError(
            f"blocks {first} and {last} must share one stream: another stage begins between them"
        )
    channels = _conv(blocks[first].conv3).out_channels
    if matrix.shape != (channels, channels):
        raise ValueError(f"matrix must be {channels} x {channels}: got {tuple(matrix.shape)}")
    end = blocks[first].act3
    eye = torch.eye(channels, dtype=matrix.dtype, device=matrix.device)
    orthogonal = torch.allclose(matrix @ matrix.T, eye, atol=1e-5)
    if not isinstance(end, nn.Identity) and not (isinstance(end, BallProjection) and orthogonal):
        needed = "orthogonal" if isinstance(end, BallProjection) else "the identity"
        raise ValueError(f"matrix must be {needed} behind the {type(end).__name__} of block {first}")

    inverse = torch.linalg.inv(matrix)
    for block in blocks[first:last]:
        _write(_conv(block.conv3), matrix)
    for block in blocks[first + 1 : last + 1]:
        _read(_conv(block.conv1), inverse)
    for block, act, factor in ((blocks[first], _write, matrix), (blocks[last], _read, inverse)):
        if isinstance(block.skip, nn.Identity):
            weight = _conv(block.conv1).weight
            block.skip = nn.Conv2d(channels, channels, 1, bias=False).to(weight.device, weight.dtype)
            nn.init.dirac_(block.skip.weight)
        act(_conv(block.skip), factor)
    return model


def _conv(module: nn.Module) -> nn.Conv2d:
    assert isinstance(module, nn.Conv2d)
    return module


def _write(conv: nn.Conv2d, matrix: Tensor) -> None:
    conv.weight.copy_(torch.einsum("ij,jkhw->ikhw", matrix, conv.weight))
    if conv.bias is not None:
        conv.bias.copy_(matrix @ conv.bias)


def _read(conv: nn.Conv2d, inverse: Tensor) -> None:
    conv.weight.copy_(torch.einsum("ijhw,jk->ikhw", conv.weight, inverse))


VARIANTS = {
    "qlnet50": Variant(QLNet, QLNetConfig()),
    "qlnet_test": Variant(QLNet, QLNetConfig((1, 2), (8, 12), wide_until=8), size=64),
}
