"""The All-CNN family: what becomes of a plain network when convolutions with a stride stand for its pooling.

Paper: Springenberg et al., Striving for Simplicity, https://arxiv.org/abs/1412.6806. Guided backpropagation, the
paper's second part, is in `omniconv.inspect.backprop`. The paper does not say how weights start: here normal with
variance 2 / fan in, and biases at zero. Its class scores are a 1x1 convolution whose map is averaged; since both
are linear, the map is averaged first here, and the ReLU that its table has on them is left out.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from omniconv.models.backbone import Backbone, Feature, FeatureInfo, Variant

__all__ = ["AllCNN", "AllCNNConfig"]

_KERNELS = {"a": (5,), "b": (5, 1), "c": (3, 3)}


@dataclass(frozen=True)
class AllCNNConfig:
    """What tells one network of the paper's two tables from another.

    Attributes:
        base: "a" (a 5x5 convolution a stage), "b" (with a 1x1 behind it) or "c" (two 3x3).
        downsample: how each of the first two stages halves its map: "pool" (3x3 maximum pooling: the base model),
            "stride" (in the stage's last convolution: Strided-CNN), "conv_pool" (a 3x3 convolution, then the pooling:
            ConvPool-CNN) or "conv" (a 3x3 convolution of stride 2: All-CNN).
        width: channels of the first stage; the others have twice as many.
        input_drop_rate: dropout of the images.
        drop_rate: dropout behind each halving.
    """

    base: Literal["a", "b", "c"] = "c"
    downsample: Literal["pool", "stride", "conv_pool", "conv"] = "conv"
    width: int = 96
    input_drop_rate: float = 0.2
    drop_rate: float = 0.5

    def __post_init__(self) -> None:
        if self.base not in _KERNELS:
            raise ValueError(f"base must be one of {sorted(_KERNELS)}: got {self.base!r}")
        if self.downsample not in ("pool", "stride", "conv_pool", "conv"):
            raise ValueError(
                f"downsample must be 'pool', 'stride', 'conv_pool' or 'conv': got {self.downsample!r}"
            )


class Stage(nn.Sequential):
    """Convolutions, each with a ReLU behind it, and what halves the map."""

    def __init__(self, config: AllCNNConfig, in_channels: int, channels: int) -> None:
        super().__init__()
        kernels = [(kernel, 1) for kernel in _KERNELS[config.base]]
        if config.downsample == "stride":
            kernels[-1] = (kernels[-1][0], 2)
        elif config.downsample != "pool":
            kernels.append((3, 2 if config.downsample == "conv" else 1))
        for index, (kernel, stride) in enumerate(kernels, 1):
            conv = nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2)
            self.add_module(f"conv{index}", conv)
            self.add_module(f"act{index}", nn.ReLU(inplace=True))
            in_channels = channels
        if config.downsample in ("pool", "conv_pool"):
            self.pool = nn.MaxPool2d(3, 2, 1)
        self.drop = nn.Dropout(config.drop_rate)


class Top(nn.Sequential):
    """The last stage: a 3x3 convolution without padding and a 1x1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 1)
        self.act2 = nn.ReLU(inplace=True)


class AllCNN(Backbone):
    """Plain network of `Striving for Simplicity <https://arxiv.org/abs/1412.6806>`_, with or without pooling.

    Args:
        config: which one.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.

    Shapes:
        - input: :math:`(N, C, H, W)`, at least 9 pixels along each side
        - output: :math:`(N, K)`
    """

    def __init__(
        self, config: AllCNNConfig = AllCNNConfig(), num_classes: int = 10, in_chans: int = 3
    ) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.input_drop = nn.Dropout(config.input_drop_rate)
        self.stages = nn.Sequential(
            Stage(config, in_chans, width), Stage(config, width, 2 * width), Top(2 * width)
        )
        self.num_features = 2 * width
        self.feature_info = FeatureInfo(
            Feature(num_chs=channels, reduction=reduction, module=f"stages.{index}")
            for index, (channels, reduction) in enumerate(((width, 2), (2 * width, 4), (2 * width, 4)))
        )
        self.reset_classifier(num_classes)
        self.apply(_init_weights)

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new classifier for `num_classes` in place; 0 leaves none."""
        self.num_classes = num_classes
        self.classifier = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        _init_weights(self.classifier)

    def get_classifier(self) -> nn.Module:
        """Return the layer that scores the classes."""
        return self.classifier

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """Return every stage's feature map."""
        x = self.input_drop(x)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits of a feature map, or the pooled features if `pre_logits`."""
        x = x.mean((2, 3))
        return x if pre_logits else self.classifier(x)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(module.bias)  # type: ignore[arg-type]


def _row(base: Literal["a", "b", "c"], downsample, params: float | None = None) -> Variant:
    return Variant(AllCNN, AllCNNConfig(base, downsample), params, size=32, classes=10)


VARIANTS = {
    "cnn_a": _row("a", "pool"),
    "cnn_b": _row("b", "pool"),
    "cnn_c": _row("c", "pool"),
    "strided_cnn_a": _row("a", "stride"),
    "strided_cnn_b": _row("b", "stride"),
    "strided_cnn_c": _row("c", "stride"),
    "convpool_cnn_a": _row("a", "conv_pool"),
    "convpool_cnn_b": _row("b", "conv_pool"),
    "convpool_cnn_c": _row("c", "conv_pool"),
    "all_cnn_a": _row("a", "conv"),
    "all_cnn_b": _row("b", "conv"),
    "all_cnn_c": _row("c", "conv", 1_369_738),
    "all_cnn_test": Variant(
        AllCNN, AllCNNConfig("b", "conv", width=8, input_drop_rate=0.1, drop_rate=0.1), size=32, classes=10
    ),
    "convpool_cnn_test": Variant(AllCNN, AllCNNConfig("a", "conv_pool", width=8), size=32, classes=10),
}
