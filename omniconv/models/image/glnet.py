"""GLNet: convolution and attention side by side, on pixels and on clusters of them; attention alone on small maps.

Paper: Zhu et al., Revisiting the Integration of Convolution and Attention, https://arxiv.org/abs/2411.14429.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from omniconv.layers.attention.glmix import GLMix
from omniconv.layers.attention.self_attention import SelfAttention2d
from omniconv.layers.norm.layer_norm2d import LayerNorm2d
from omniconv.models.backbone import Variant
from omniconv.models.image.stages import Head, MetaFormerBlock, Mlp, StageConfig, StageNetwork
from omniconv.models.weights import Rules

__all__ = ["GLBlock", "GLNet", "GLNetConfig"]


@dataclass(frozen=True)
class GLNetConfig(StageConfig):
    """What tells one GLNet from another.

    Attributes:
        mixers: each stage's token mixers: "slots" (GLMix), "pixels" (attention), or "both" in turn, beginning
            with slots.
        slots: of GLMix, a square number.
        head_width: channels of one head of attention.
        layer_scale: initial scale of every residual branch; None for none.
    """

    depths: tuple[int, ...] = (4, 4, 18, 4)
    widths: tuple[int, ...] = (64, 128, 256, 512)
    mixers: tuple[Literal["slots", "both", "pixels"], ...] = ("slots", "slots", "both", "pixels")
    slots: int = 64
    head_width: int = 32
    layer_scale: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.mixers) != len(self.depths):
            raise ValueError(f"depths and mixers must be equally long: got {self.depths} and {self.mixers}")


class ResidualDepthwise(nn.Module):
    """3x3 depthwise convolution beside a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """Add to `x` its convolution."""
        return x + self.conv(x)


class GLBlock(MetaFormerBlock):
    """Convolutional position encoding, token mixer and MLP, each on a residual branch.

    Args:
        config: of the network.
        channels: C.
        slots: mix by `GLMix`, whose slots start from the map before its positions are encoded; otherwise by
            attention between pixels.
        drop: stochastic depth.
    """

    def __init__(self, config: GLNetConfig, channels: int, *, slots: bool, drop: float) -> None:
        heads, hidden = channels // config.head_width, 3 * channels
        mixer = GLMix(channels, heads, slots=config.slots) if slots else SelfAttention2d(channels, heads)
        mlp = Mlp(channels, hidden, nn.Sequential(ResidualDepthwise(hidden), nn.GELU()))
        super().__init__(channels, mixer, mlp, LayerNorm2d, layer_scale=config.layer_scale, drop=drop)
        self.pos_conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.slots = slots

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        """Return the block's output."""
        if self.slots:
            context = (x,)
        return super().forward(x + self.pos_conv(x), *context)


def init_attention(module: nn.Module) -> None:
    """Draw linear layers as the authors do; convolutions stay as torch draws them."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, SelfAttention2d):
        nn.init.xavier_uniform_(module.qkv.weight)


class GLNet(StageNetwork):
    """Network of `GLMix <https://arxiv.org/abs/2411.14429>`_.

    Args:
        config: which one.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.

    Shapes:
        - input: :math:`(N, C, H, W)`
        - output: :math:`(N, K)`
    """

    config: GLNetConfig
    init_weights = staticmethod(init_attention)

    def make_stem(self, in_chans: int) -> nn.Module:
        """Return two 3x3 convolutions of stride 2 with batch norm, and GELU between them."""
        width = self.config.widths[0]
        return nn.Sequential(
            nn.Conv2d(in_chans, width // 2, 3, 2, 1),
            nn.BatchNorm2d(width // 2),
            nn.GELU(),
            nn.Conv2d(width // 2, width, 3, 2, 1),
            nn.BatchNorm2d(width),
        )

    def make_downsample(self, stage: int) -> nn.Module:
        """Return a 3x3 convolution of stride 2 and a norm."""
        before, after = self.config.widths[stage - 1 : stage + 1]
        return nn.Sequential(nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after))

    def make_block(self, stage: int, index: int, drop: float) -> nn.Module:
        """Return a block of `stage`."""
        mixer = self.config.mixers[stage]
        slots = mixer == "slots" or (mixer == "both" and index % 2 == 0)
        return GLBlock(self.config, self.config.widths[stage], slots=slots, drop=drop)

    def make_head(self) -> nn.Module:
        """Return a head with a batch norm."""
        return Head(nn.BatchNorm2d(self.num_features), self.config.drop_rate, norm_first=True)


OFFICIAL_NAMES: Rules = (
    # The stem's first entry is empty.
    *((rf"^downsample_layers\.0\.{place}\.", f"stem.{place - 1}.") for place in range(1, 6)),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"\.slot_scale$", ".token_mixer.scale"),
    (r"\.feature_conv\.", ".token_mixer.local."),
    (r"\.relation_mha\.", ".token_mixer.attention."),
    (r"\.mha_op\.", ".token_mixer."),
    (r"\.in_proj_(weight|bias)$", r".qkv.\1"),
    (r"\.out_proj\.", ".proj."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.1\.", ".mlp.act.0.conv."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
    (r"\.ls([12])\.gamma$", r".layer_scale\1.scale"),
    (r"^norm\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)
"""From https://github.com/rayleizhu/GLMix; some of their scales have three more axes."""


def _row(width: int, params: float, macs: float, layer_scale: float | None = None) -> Variant:
    widths = (width, 2 * width, 4 * width, 8 * width)
    return Variant(GLNet, GLNetConfig(widths=widths, layer_scale=layer_scale), params, macs)


VARIANTS = {
    "glnet_4g": _row(64, 27.0e6, 4.5e9),
    "glnet_9g": _row(96, 60.0e6, 9.7e9),
    "glnet_16g": _row(128, 106.1e6, 16.7e9, layer_scale=1e-4),
    "glnet_test": Variant(
        GLNet, GLNetConfig((2,), (16,), mixers=("both",), slots=4, head_width=8, layer_scale=1e-4), size=32
    ),
}
