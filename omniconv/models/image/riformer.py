"""RIFormer: a MetaFormer without token mixers; in their place a scale and shift that fold into the norm.

Paper: Wang et al., https://arxiv.org/abs/2304.05659, on PoolFormer's layout. Pixels meet in the stem and between the
stages alone. `deploy()` folds every affine map into the norm before it. Names of parameters are those of timm's
PoolFormer, whose weights a RIFormer starts from, and within the mixer those of the public weights.
"""

import copy
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from omniconv.models.backbone import Variant
from omniconv.models.image.stages import Head, MetaFormerBlock, Mlp, StageConfig, StageNetwork
from omniconv.models.weights import Rules

__all__ = ["AffineBlock", "RIFormer", "RIFormerConfig"]

map_norm = partial(nn.GroupNorm, 1)
"""Makes PoolFormer's norm, over all channels and pixels of a map."""


class AffineMixer(nn.Module):
    r"""What is left of a token mixer: :math:`s \odot x + b - x`, with a scale and a shift a channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.affine = nn.Conv2d(channels, channels, 1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return by how much the affine map changes `x`."""
        return self.affine(x) - x


class AffineBlock(MetaFormerBlock):
    """PoolFormer's block with an affine map for a token mixer.

    Args:
        channels: C.
        layer_scale: initial scale of both residual branches.
        drop: stochastic depth of both.
    """

    def __init__(self, channels: int, layer_scale: float, drop: float) -> None:
        mlp = Mlp(channels, 4 * channels, nn.GELU())
        super().__init__(channels, AffineMixer(channels), mlp, map_norm, layer_scale=layer_scale, drop=drop)

    def merged(self) -> MetaFormerBlock:
        """Return the block without a mixer that equals this one in eval mode."""
        state = self.state_dict()
        factor = state.pop("token_mixer.affine.weight").flatten() - 1
        shift = state.pop("token_mixer.affine.bias")
        state["norm1.weight"] = state["norm1.weight"] * factor
        state["norm1.bias"] = state["norm1.bias"] * factor + shift
        block = MetaFormerBlock(
            len(factor), nn.Identity(), copy.deepcopy(self.mlp), map_norm, layer_scale=1.0
        )
        block.to(factor).load_state_dict(state)
        return block


@dataclass(frozen=True)
class RIFormerConfig(StageConfig):
    """What tells one RIFormer from another.

    Attributes:
        layer_scale: initial scale of every residual branch.
    """

    layer_scale: float = 1e-5


class RIFormer(StageNetwork):
    """Network of `RIFormer <https://arxiv.org/abs/2304.05659>`_.

    Args:
        config: which one.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.

    Shapes:
        - input: :math:`(N, C, H, W)`
        - output: :math:`(N, K)`
    """

    config: RIFormerConfig

    def make_stem(self, in_chans: int) -> nn.Module:
        """Return a 7x7 convolution of stride 4."""
        return nn.Sequential(OrderedDict(conv=nn.Conv2d(in_chans, self.config.widths[0], 7, 4, 2)))

    def make_downsample(self, stage: int) -> nn.Module:
        """Return a 3x3 convolution of stride 2."""
        before, after = self.config.widths[stage - 1 : stage + 1]
        return nn.Sequential(OrderedDict(conv=nn.Conv2d(before, after, 3, 2, 1)))

    def make_block(self, stage: int, index: int, drop: float) -> nn.Module:
        """Return a block of `stage`."""
        return AffineBlock(self.config.widths[stage], self.config.layer_scale, drop)

    def make_head(self) -> nn.Module:
        """Return a head with the blocks' norm."""
        return Head(map_norm(self.num_features), self.config.drop_rate, norm_first=True)


OFFICIAL_NAMES: Rules = (
    (r"^backbone\.", ""),
    (r"^patch_embed\.proj\.", "stem.conv."),
    # Stages and downsamplings alternate in one list.
    *((rf"^network\.{2 * stage}\.", f"stages.{stage}.blocks.") for stage in range(4)),
    *((rf"^network\.{2 * stage - 1}\.proj\.", f"stages.{stage}.downsample.conv.") for stage in (1, 2, 3)),
    (r"\.layer_scale_([12])$", r".layer_scale\1.scale"),
    (r"^norm6\.", "head.norm."),
)
"""From the authors' weights, which MMPretrain publishes, https://github.com/open-mmlab/mmpretrain."""


def _row(
    depths: tuple[int, ...], widths: tuple[int, ...], layer_scale: float, params: float, macs: float
) -> Variant:
    config = RIFormerConfig(depths, widths, layer_scale=layer_scale)
    return Variant(RIFormer, config, params, macs, source="MMPretrain's model cards")


_SMALL, _MEDIUM = (64, 128, 320, 512), (96, 192, 384, 768)


VARIANTS = {
    "riformer_s12": _row((2, 2, 6, 2), _SMALL, 1e-5, 11.92e6, 1.82e9),
    "riformer_s24": _row((4, 4, 12, 4), _SMALL, 1e-5, 21.39e6, 3.41e9),
    "riformer_s36": _row((6, 6, 18, 6), _SMALL, 1e-6, 30.86e6, 5.00e9),
    "riformer_m36": _row((6, 6, 18, 6), _MEDIUM, 1e-6, 56.17e6, 8.80e9),
    "riformer_m48": _row((8, 8, 24, 8), _MEDIUM, 1e-6, 73.47e6, 11.59e9),
    "riformer_test": Variant(RIFormer, RIFormerConfig((1, 1), (8, 16)), size=32),
}
