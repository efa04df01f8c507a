"""UniRepLKNet: few layers with large kernels, each trained beside dilated small ones.

Paper: Ding et al., https://arxiv.org/abs/2311.15599. Parameter names are those of the public weights, which are in
the training form; `deploy()` merges each block's branches, norms and scales into its three linear layers.
"""

import copy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from omniconv.layers.conv.dilated_reparam import DilatedReparamBlock
from omniconv.layers.conv.reparam import fuse_conv_bn
from omniconv.layers.drop_path import DropPath
from omniconv.layers.norm.grn import global_response_norm
from omniconv.layers.norm.layer_norm2d import LayerNorm2d
from omniconv.models.backbone import Backbone, Feature, FeatureInfo, Variant

__all__ = ["UniRepLKNet", "UniRepLKNetBlock", "UniRepLKNetConfig"]


@dataclass(frozen=True)
class UniRepLKNetConfig:
    """What tells one UniRepLKNet from another.

    Attributes:
        depths: blocks a stage.
        widths: channels of each stage, even.
        kernel_size: K of the blocks with a large kernel, one of those of `DilatedReparamBlock`.
        large_every: of each stage's blocks, which have the large kernel: every n-th, beginning with the first;
            0 for none. The other blocks have 3x3 kernels.
        gate: a channel gate in every block.
        reparam: train the large kernels beside dilated small ones.
        layer_scale: initial scale of every residual branch.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0 at the first.
    """

    depths: tuple[int, ...] = (3, 3, 27, 3)
    widths: tuple[int, ...] = (96, 192, 384, 768)
    kernel_size: int = 13
    large_every: tuple[int, ...] = (0, 1, 3, 1)
    gate: bool = True
    reparam: bool = True
    layer_scale: float = 1e-6
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        if not len(self.depths) == len(self.widths) == len(self.large_every):
            raise ValueError(
                "depths, widths and large_every must be equally long: "
                f"got {self.depths}, {self.widths} and {self.large_every}"
            )

    def kernel(self, stage: int, block: int) -> int:
        """Return the kernel size of a block."""
        every = self.large_every[stage]
        return self.kernel_size if every and block % every == 0 else 3


class ChannelGate(nn.Module):
    """Squeeze-and-excitation with a quarter of the channels, under the names of the public weights."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, channels // 4, 1)
        self.up = nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Scale every channel of `x` by its gate."""
        z = x.mean((2, 3), keepdim=True)
        return x * self.up(self.down(z).relu()).sigmoid()


class ResponseNorm(nn.Module):
    """Global response norm of (N, H, W, C) with the parameter shapes of the public weights."""

    def __init__(self, channels: int, bias: bool = True) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Scale every channel of `x` by its energy relative to the others."""
        return global_response_norm(x, self.gamma, self.beta, channels_last=True)


class Permute(nn.Module):
    """Move the axes of a map; it holds the place that the public weights' numbering gives it."""

    def __init__(self, *axes: int) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with its axes in the new order."""
        return x.permute(self.axes)


to_channels_last = partial(Permute, 0, 2, 3, 1)
to_channels_first = partial(Permute, 0, 3, 1, 2)


class UniRepLKNetBlock(nn.Module):
    r"""Large depthwise convolution, channel gate and pointwise MLP with global response norm on a residual branch.

    .. math:: y = x + \gamma \cdot \mathrm{BN}\bigl(W_2\, \mathrm{GRN}(\mathrm{GELU}(W_1\, \mathrm{SE}(
              \mathrm{BN}(k * x))))\bigr)
    """

    def __init__(self, config: UniRepLKNetConfig, channels: int, kernel: int, drop: float) -> None:
        super().__init__()
        self.dwconv: nn.Module
        if kernel == 3 or not config.reparam:
            self.dwconv = nn.Conv2d(
                channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False
            )
        else:
            self.dwconv = DilatedReparamBlock(channels, kernel)
        self.norm = nn.BatchNorm2d(channels)
        self.se: nn.Module = ChannelGate(channels) if config.gate else nn.Identity()
        self.pwconv1 = nn.Sequential(to_channels_last(), nn.Linear(channels, 4 * channels))
        self.act = nn.Sequential(nn.GELU(), ResponseNorm(4 * channels))
        self.pwconv2 = nn.Sequential(
            nn.Linear(4 * channels, channels, bias=False), to_channels_first(), nn.BatchNorm2d(channels)
        )
        self.gamma = nn.Parameter(torch.full((channels,), config.layer_scale))
        self.drop_path = DropPath(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y = self.se(self.norm(self.dwconv(x)))
        y = self.pwconv2(self.act(self.pwconv1(y)))
        return x + self.drop_path(self.gamma[:, None, None] * y)

    def merged(self) -> "MergedBlock":
        """Return the block without norms, branches and scale that equals this one in eval mode."""
        return MergedBlock(self)


class MergedBlock(nn.Module):
    """A block in the form in which it is deployed; the parameters keep their names."""

    def __init__(self, block: UniRepLKNetBlock) -> None:
        super().__init__()
        conv = block.dwconv.merged() if isinstance(block.dwconv, DilatedReparamBlock) else block.dwconv
        assert isinstance(conv, nn.Conv2d)
        channels, kernel = conv.out_channels, conv.kernel_size[0]
        options = {"device": conv.weight.device, "dtype": conv.weight.dtype}
        weight, bias = fuse_conv_bn(conv.weight, conv.bias, block.norm)
        self.dwconv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels, **options)
        self.dwconv.weight, self.dwconv.bias = _parameter(weight), _parameter(bias)
        self.se = copy.deepcopy(block.se)
        self.pwconv1 = copy.deepcopy(block.pwconv1)

        grn, linear, norm = block.act[1], block.pwconv2[0], block.pwconv2[2]
        assert isinstance(grn, ResponseNorm)
        assert isinstance(linear, nn.Linear)
        assert isinstance(norm, nn.BatchNorm2d)
        assert grn.beta is not None
        plain = ResponseNorm(linear.in_features, bias=False)
        plain.gamma = _parameter(grn.gamma.clone())
        self.act = nn.Sequential(nn.GELU(), plain)
        # The response norm's bias passes through the second linear layer and becomes that layer's own.
        weight, bias = fuse_conv_bn(linear.weight, linear.weight @ grn.beta.flatten(), norm)
        merged = nn.Linear(linear.in_features, channels, **options)
        merged.weight, merged.bias = _parameter(block.gamma[:, None] * weight), _parameter(block.gamma * bias)
        self.pwconv2 = nn.Sequential(merged, to_channels_first())

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        return x + self.pwconv2(self.act(self.pwconv1(self.se(self.dwconv(x)))))


def _parameter(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach())


class UniRepLKNet(Backbone):
    """Network of `UniRepLKNet <https://arxiv.org/abs/2311.15599>`_.

    Args:
        config: which one.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.

    Shapes:
        - input: :math:`(N, C, H, W)`
        - output: :math:`(N, K)`
    """

    def __init__(self, config: UniRepLKNetConfig, num_classes: int = 1000, in_chans: int = 3) -> None:
        super().__init__()
        self.config = config
        width = config.widths[0]
        self.downsample_layers = nn.ModuleList(
            [
                nn.Sequential(
                    nn.Conv2d(in_chans, width // 2, 3, 2, 1),
                    LayerNorm2d(width // 2),
                    nn.GELU(),
                    nn.Conv2d(width // 2, width, 3, 2, 1),
                    LayerNorm2d(width),
                )
            ]
        )
        for before, after in zip(config.widths, config.widths[1:], strict=False):
            self.downsample_layers.append(
                nn.Sequential(nn.Conv2d(before, after, 3, 2, 1), LayerNorm2d(after))
            )

        drops = torch.linspace(0, config.drop_path_rate, sum(config.depths), device="cpu").tolist()
        self.feature_info = FeatureInfo()
        self.stages = nn.ModuleList()
        for stage, (depth, width) in enumerate(zip(config.depths, config.widths, strict=True)):
            blocks = [
                UniRepLKNetBlock(config, width, config.kernel(stage, block), drops.pop(0))
                for block in range(depth)
            ]
            self.stages.append(nn.Sequential(*blocks))
            self.feature_info.append(Feature(num_chs=width, reduction=4 * 2**stage, module=f"stages.{stage}"))

        self.num_features = config.widths[-1]
        self.norm = nn.LayerNorm(self.num_features, eps=1e-6)
        self.drop = nn.Dropout(config.drop_rate)
        self.reset_classifier(num_classes)
        self.apply(_init_weights)

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new classifier for `num_classes` in place; 0 leaves none."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        _init_weights(self.head)

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.head

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """Return every stage's feature map."""
        maps = []
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
            maps.append(x)
        return maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits of a feature map, or the normed, pooled features if `pre_logits`."""
        x = self.drop(self.norm(x.mean((2, 3))))
        return x if pre_logits else self.head(x)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _row(
    depths: tuple[int, ...], width: int, third: int, params: float, macs: float | None, size: int = 224
) -> Variant:
    widths = (width, 2 * width, 4 * width, 8 * width)
    config = UniRepLKNetConfig(depths, widths, large_every=(0, 1, third, 1))
    return Variant(UniRepLKNet, config, params, macs, size, deployed=True)


_A, _N, _T, _S = (2, 2, 6, 2), (2, 2, 8, 2), (3, 3, 18, 3), (3, 3, 27, 3)

VARIANTS = {
    # Published as 0.6 G: one digit, coarser than the 3% to which multiply-adds are held.
    "unireplknet_a": _row(_A, 40, 1, 4.4e6, None),
    "unireplknet_f": _row(_A, 48, 1, 6.2e6, 0.9e9),
    "unireplknet_p": _row(_A, 64, 1, 10.7e6, 1.6e9),
    "unireplknet_n": _row(_N, 80, 1, 18.3e6, 2.8e9),
    "unireplknet_t": _row(_T, 80, 2, 31e6, 4.9e9),
    "unireplknet_s": _row(_S, 96, 3, 56e6, 9.1e9),
    "unireplknet_b": _row(_S, 128, 3, 98e6, 47.2e9, 384),
    "unireplknet_l": _row(_S, 192, 3, 218e6, 105.4e9, 384),
    "unireplknet_xl": _row(_S, 256, 3, 386e6, 187e9, 384),
    "unireplknet_test": Variant(
        UniRepLKNet, UniRepLKNetConfig((1, 1, 2, 1), (8, 16, 24, 32), 13, (0, 1, 2, 1)), size=64
    ),
}  # fmt: skip
