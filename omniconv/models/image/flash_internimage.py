"""FlashInternImage: InternImage with DCNv4 as its operator.

Papers: Xiong et al., Efficient Deformable ConvNets, https://arxiv.org/abs/2401.06197; InternImage, Wang et al.,
https://arxiv.org/abs/2211.05778. Parameter names are those of the public weights, in which a norm stands behind the
change of layout that it needs there; an identity takes that place here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from omniconv.layers.conv.dcn import DCNv4
from omniconv.layers.drop_path import DropPath
from omniconv.layers.norm.layer_norm2d import LayerNorm2d
from omniconv.models.backbone import Backbone, Feature, FeatureInfo, Variant

__all__ = ["FlashInternImage", "FlashInternImageConfig"]


@dataclass(frozen=True)
class FlashInternImageConfig:
    """What tells one FlashInternImage from another.

    Attributes:
        width: channels of the first stage; they double from stage to stage.
        depths: blocks a stage.
        group_width: channels of a group of the operator.
        offset_scale: of the operator.
        dw_kernel_size: of the depthwise convolution before its offsets and masks; None for none.
        post_norm: norms stand at the end of the residual branches instead of their beginning.
        layer_scale: initial scale of every residual branch; None for no scale.
        bias: the last linear layer of every branch has one.
        mlp_ratio: hidden channels of the MLP over the block's.
        head_ratio: channels of the 1x1 convolution before the pooling, over the last stage's.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0 at the first.
    """

    width: int = 64
    depths: tuple[int, ...] = (4, 4, 18, 4)
    group_width: int = 16
    offset_scale: float = 1.0
    dw_kernel_size: int | None = None
    post_norm: bool = False
    layer_scale: float | None = None
    bias: bool = False
    mlp_ratio: int = 4
    head_ratio: float = 1.5
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        if self.width % self.group_width:
            raise ValueError(f"group_width must divide width: got {self.group_width} and {self.width}")


class Mlp(nn.Module):
    """Expand, GELU, project back, on every pixel."""

    def __init__(self, channels: int, hidden: int, *, bias: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the channels of every pixel."""
        return self.fc2(self.act(self.fc1(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)


class FlashInternImageBlock(nn.Module):
    r"""DCNv4 and an MLP on residual branches.

    .. math:: z = x + \gamma_1 \mathrm{DCN}(\mathrm{LN}(x)), \qquad y = z + \gamma_2 \mathrm{MLP}(\mathrm{LN}(z))

    with the norms behind DCN and MLP if `post_norm`.
    """

    def __init__(self, config: FlashInternImageConfig, channels: int, drop: float) -> None:
        super().__init__()
        self.post_norm = config.post_norm
        self.norm1 = nn.Sequential(LayerNorm2d(channels))
        self.dcn = DCNv4(
            channels, channels // config.group_width, dw_kernel_size=config.dw_kernel_size,
            offset_scale=config.offset_scale, output_bias=config.bias,
        )  # fmt: skip
        self.norm2 = nn.Sequential(LayerNorm2d(channels))
        self.mlp = Mlp(channels, channels * config.mlp_ratio, bias=config.bias)
        self.gamma1 = self.gamma2 = None
        if config.layer_scale is not None:
            self.gamma1, self.gamma2 = (
                nn.Parameter(torch.full((channels,), config.layer_scale)) for _ in range(2)
            )
        self.drop_path = DropPath(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        x = x + self._branch(x, self.dcn, self.norm1, self.gamma1)
        return x + self._branch(x, self.mlp, self.norm2, self.gamma2)

    def _branch(self, x: Tensor, layer: nn.Module, norm: nn.Module, gamma: Tensor | None) -> Tensor:
        y = norm(layer(x)) if self.post_norm else layer(norm(x))
        return self.drop_path(y if gamma is None else gamma[:, None, None] * y)


class FlashInternImageStage(nn.Module):
    """Blocks of one width; `downsample`, if there is another stage, halves the map and doubles the channels."""

    def __init__(
        self, config: FlashInternImageConfig, channels: int, drops: list[float], *, last: bool
    ) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(FlashInternImageBlock(config, channels, drop) for drop in drops))
        self.norm = nn.Identity() if config.post_norm else nn.Sequential(LayerNorm2d(channels))
        self.downsample = nn.Identity()
        if not last:
            self.downsample = nn.Sequential()
            self.downsample.add_module("conv", nn.Conv2d(channels, 2 * channels, 3, 2, 1, bias=False))
            self.downsample.add_module("norm", nn.Sequential(nn.Identity(), LayerNorm2d(2 * channels)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the stage's map, as large as its input."""
        return self.norm(self.blocks(x))


class FlashInternImage(Backbone):
    """Network of `Efficient Deformable ConvNets <https://arxiv.org/abs/2401.06197>`_.

    Args:
        config: which one.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.

    Shapes:
        - input: :math:`(N, C, H, W)`
        - output: :math:`(N, K)`
    """

    def __init__(self, config: FlashInternImageConfig, num_classes: int = 1000, in_chans: int = 3) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.patch_embed = nn.Sequential()
        for name, layer in (
            ("conv1", nn.Conv2d(in_chans, width // 2, 3, 2, 1)),
            ("norm1", nn.Sequential(nn.Identity(), LayerNorm2d(width // 2))),
            ("act", nn.GELU()),
            ("conv2", nn.Conv2d(width // 2, width, 3, 2, 1)),
            ("norm2", nn.Sequential(nn.Identity(), LayerNorm2d(width))),
        ):
            self.patch_embed.add_module(name, layer)

        drops = torch.linspace(0, config.drop_path_rate, sum(config.depths), device="cpu").tolist()
        self.feature_info = FeatureInfo()
        self.levels = nn.ModuleList()
        for stage, depth in enumerate(config.depths):
            last = stage == len(config.depths) - 1
            done, channels = sum(config.depths[:stage]), width * 2**stage
            self.levels.append(FlashInternImageStage(config, channels, drops[done : done + depth], last=last))
            self.feature_info.append(
                Feature(num_chs=channels, reduction=4 * 2**stage, module=f"levels.{stage}")
            )

        self.num_features = width * 2 ** (len(config.depths) - 1)
        self.head_width = int(self.num_features * config.head_ratio)
        self.conv_head = nn.Sequential(
            nn.Conv2d(self.num_features, self.head_width, 1, bias=False),
            nn.Sequential(nn.BatchNorm2d(self.head_width)),
            nn.GELU(),
        )
        self.head: nn.Module = nn.Identity()
        self.reset_classifier(num_classes)
        self.apply(_init_weights)
        for module in self.modules():
            if isinstance(module, DCNv4):
                module.reset_parameters()

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new classifier for `num_classes` in place; 0 leaves none."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.head_width, num_classes) if num_classes else nn.Identity()
        _init_weights(self.head)

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.head

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """Return every stage's feature map."""
        x = self.patch_embed(x)
        maps = []
        for level in self.levels:
            maps.append(level(x))
            x = level.get_submodule("downsample")(maps[-1])
        return maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits of a feature map, or what enters the classifier if `pre_logits`."""
        x = self.conv_head(x).mean((2, 3))
        return x if pre_logits else self.head(x)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_large = {"dw_kernel_size": 3, "post_norm": True, "layer_scale": 1e-5}

VARIANTS = {
    "flash_internimage_tiny": Variant(FlashInternImage, FlashInternImageConfig(), 30e6),
    "flash_internimage_small": Variant(
        FlashInternImage, FlashInternImageConfig(80, (4, 4, 21, 4), **_large), 50e6
    ),
    "flash_internimage_base": Variant(
        FlashInternImage, FlashInternImageConfig(112, (4, 4, 21, 4), offset_scale=0.5, **_large), 97e6
    ),
    "flash_internimage_large": Variant(
        FlashInternImage,
        FlashInternImageConfig(160, (5, 5, 22, 5), offset_scale=2.0, bias=True, **_large),
        223e6,
        size=384,
    ),
    "flash_internimage_test": Variant(
        FlashInternImage,
        FlashInternImageConfig(8, (1, 1, 2), 4, dw_kernel_size=3, layer_scale=0.1, mlp_ratio=2),
        size=32,
    ),
}
