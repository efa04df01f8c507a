"""AlterNet: a pre-activation residual network in which attention stands at the end of every stage.

Paper: Park and Kim, How Do Vision Transformers Work?, https://arxiv.org/abs/2202.06709. Its rule: going from the end of
a stage to its beginning, every other block becomes a block of local attention, as long as that helps; later stages get
more heads. Without attention it is the pre-activation ResNet of He et al., https://arxiv.org/abs/1603.05027. Parameter
names come from those of the official weights by `OFFICIAL_NAMES`. Any size of image works: windows are filled up.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from omniconv.layers.attention.window import WindowAttention
from omniconv.layers.drop_path import DropPath
from omniconv.models.backbone import Backbone, Feature, FeatureInfo, Variant
from omniconv.models.weights import Rules

__all__ = ["AlterNet", "AlterNetConfig", "AttentionBlock", "ConvBlock"]

OFFICIAL_NAMES: Rules = (
    (r"^layer0\.layer0\.0\.", "stem.0."),
    (r"\.attn\.attn\.to_q\.", ".attn.q."),
    (r"\.attn\.attn\.to_kv\.", ".attn.kv."),
    (r"\.attn\.attn\.to_out\.0\.", ".attn.proj."),
    (r"\.attn\.pos_embedding$", ".attn.bias"),
    (r"^classifier\.0\.bn\.", "norm."),
    (r"^classifier\.0\.dense\.", "fc."),
)


@dataclass(frozen=True)
class AlterNetConfig:
    """What tells one AlterNet from another.

    Attributes:
        depths: blocks of each stage.
        attention: how many of them attend: the last, the last but two, and so on.
        num_heads: of the attention in each stage.
        widths: base channels of each stage; a bottleneck puts out four times as many.
        bottleneck: 1x1, 3x3, 1x1 blocks instead of two 3x3, and attention on a quarter of the channels.
        head_dim: channels of a head.
        window_size: pixels along a side of the attention's windows.
        stem: "7x7" with stride 2 and max pooling, or "3x3" with neither, for images of about 32 pixels.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0 at the first.
    """

    depths: tuple[int, ...] = (3, 4, 6, 4)
    attention: tuple[int, ...] = (0, 1, 3, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    widths: tuple[int, ...] = (64, 128, 256, 512)
    bottleneck: bool = True
    head_dim: int = 64
    window_size: int = 7
    stem: Literal["7x7", "3x3"] = "7x7"
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        if not len(self.depths) == len(self.attention) == len(self.num_heads) == len(self.widths):
            raise ValueError("depths, attention, num_heads and widths must be equally long")
        if any(2 * count > depth for count, depth in zip(self.attention, self.depths, strict=True)):
            raise ValueError(
                f"attention must be at most half of depths: got {self.attention} and {self.depths}"
            )

    def attends(self, stage: int) -> list[bool]:
        """Return for every block of a stage whether it attends."""
        depth, count = self.depths[stage], self.attention[stage]
        return [False] * (depth - 2 * count) + [False, True] * count


class _PreActBlock(nn.Module):
    """A residual block that normalises and activates before its branches part, where the shortcut changes the map."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, drop: float) -> None:
        super().__init__()
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut.append(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False))
        self.drop_path = DropPath(drop)

    def preact(self, x: Tensor) -> Tensor:
        """Normalise and activate `x`."""
        raise NotImplementedError

    def branch(self, x: Tensor) -> Tensor:
        """Return the residual branch of what `preact` gives."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y = self.preact(x)
        return self.shortcut(y if len(self.shortcut) else x) + self.drop_path(self.branch(y))


class ConvBlock(_PreActBlock):
    """Two 3x3 convolutions, or 1x1, 3x3 and 1x1 of a bottleneck, each after batch norm and ReLU."""

    def __init__(
        self, in_channels: int, width: int, *, bottleneck: bool, stride: int = 1, drop: float = 0.0
    ) -> None:
        super().__init__(in_channels, width * 4 if bottleneck else width, stride, drop)
        self.bn = nn.BatchNorm2d(in_channels)

        def after_norm(out_channels: int, kernel: int, stride: int = 1) -> nn.Sequential:
            conv = nn.Conv2d(width, out_channels, kernel, stride, kernel // 2, bias=False)
            return nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), conv)

        if bottleneck:
            self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
            self.conv2 = after_norm(width, 3, stride)
            self.conv3: nn.Module = after_norm(4 * width, 1)
        else:
            self.conv1 = nn.Conv2d(in_channels, width, 3, stride, 1, bias=False)
            self.conv2 = after_norm(width, 3)
            self.conv3 = nn.Identity()

    def preact(self, x: Tensor) -> Tensor:
        """Normalise and activate `x`."""
        return self.bn(x).relu()

    def branch(self, x: Tensor) -> Tensor:
        """Convolve."""
        return self.conv3(self.conv2(self.conv1(x)))


class AttentionBlock(_PreActBlock):
    """Batch norm, GELU, a 1x1 convolution, batch norm and attention in windows; there is no MLP."""

    def __init__(
        self,
        in_channels: int,
        width: int,
        num_heads: int,
        *,
        bottleneck: bool,
        head_dim: int,
        window_size: int,
        drop: float = 0.0,
    ) -> None:
        out_channels, inner = (width * 4, in_channels // 4) if bottleneck else (width, in_channels)
        super().__init__(in_channels, out_channels, 1, drop)
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.act = nn.GELU()
        self.conv = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(inner)
        self.attn = WindowAttention(
            inner,
            out_channels,
            num_heads=num_heads,
            head_dim=head_dim,
            window_size=window_size,
            shared_bias=True,
            qkv_bias=False,
        )

    def preact(self, x: Tensor) -> Tensor:
        """Normalise and activate `x`."""
        return self.act(self.norm1(x))

    def branch(self, x: Tensor) -> Tensor:
        """Attend."""
        return self.attn(self.norm2(self.conv(x)))


class AlterNet(Backbone):
    """Network of `How Do Vision Transformers Work? <https://arxiv.org/abs/2202.06709>`_.

    Args:
        config: which one.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.

    Shapes:
        - input: :math:`(N, C, H, W)`
        - output: :math:`(N, K)`
    """

    def __init__(self, config: AlterNetConfig, num_classes: int = 1000, in_chans: int = 3) -> None:
        super().__init__()
        self.config = config
        large = config.stem == "7x7"
        channels = config.widths[0]
        kernel, stride = (7, 2) if large else (3, 1)
        self.stem = nn.Sequential(nn.Conv2d(in_chans, channels, kernel, stride, kernel // 2, bias=False))
        if large:
            self.stem.append(nn.MaxPool2d(3, 2, 1))

        self.feature_info = FeatureInfo()
        self.stage_names = [f"layer{stage + 1}" for stage in range(len(config.depths))]
        drops = torch.linspace(0, config.drop_path_rate, sum(config.depths), device="cpu").tolist()
        for stage, (name, width) in enumerate(zip(self.stage_names, config.widths, strict=True)):
            blocks = nn.Sequential()
            for index, attends in enumerate(config.attends(stage)):
                if attends:
                    block: nn.Module = AttentionBlock(
                        channels, width, config.num_heads[stage], bottleneck=config.bottleneck,
                        head_dim=config.head_dim, window_size=config.window_size, drop=drops.pop(0),
                    )  # fmt: skip
                else:
                    stride = 2 if stage > 0 and index == 0 else 1
                    block = ConvBlock(
                        channels, width, bottleneck=config.bottleneck, stride=stride, drop=drops.pop(0)
                    )
                blocks.append(block)
                channels = width * 4 if config.bottleneck else width
            self.add_module(name, blocks)
            reduction = (4 if large else 1) * 2**stage
            self.feature_info.append(Feature(num_chs=channels, reduction=reduction, module=name))

        self.num_features = channels
        self.norm = nn.BatchNorm2d(channels)
        self.drop = nn.Dropout(config.drop_rate)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new classifier for `num_classes` in place; 0 leaves none."""
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.fc

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """Return every stage's feature map."""
        x = self.stem(x)
        maps = []
        for name in self.stage_names:
            x = self.get_submodule(name)(x)
            maps.append(x)
        return maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits of a feature map, or the pooled features if `pre_logits`."""
        x = self.drop(self.norm(x).relu().mean((2, 3)))
        return x if pre_logits else self.fc(x)


VARIANTS = {
    "alternet_18": Variant(AlterNet, AlterNetConfig((2, 2, 2, 2), (0, 1, 1, 1), bottleneck=False)),
    "alternet_34": Variant(AlterNet, AlterNetConfig(bottleneck=False)),
    "alternet_50": Variant(AlterNet, AlterNetConfig()),
    "alternet_101": Variant(AlterNet, AlterNetConfig((3, 4, 23, 4))),
    "alternet_152": Variant(AlterNet, AlterNetConfig((3, 8, 36, 4))),
    "alternet_test": Variant(
        AlterNet,
        AlterNetConfig((1, 2), (0, 1), (1, 2), (8, 8), head_dim=4, window_size=4, drop_path_rate=0.1),
        size=32,
    ),
}
