"""ConViT: a vision transformer most of whose blocks start as convolutions.

Paper: d'Ascoli et al., https://arxiv.org/abs/2103.10697. DeiT with gated positional self-attention in all but the last
two blocks, before which the class token joins. Parameter names are those of the public weights.
"""

from dataclasses import dataclass

from torch import nn

from omniconv.layers.attention.gpsa import GatedPositionalSelfAttention
from omniconv.models.backbone import Variant
from omniconv.models.image.vit import VisionTransformer, ViTConfig

__all__ = ["ConViT", "ConViTConfig"]


@dataclass(frozen=True)
class ConViTConfig(ViTConfig):
    """What tells one ConViT from another, beside what tells one vision transformer from another.

    Attributes:
        local_blocks: blocks with gated positional attention; fewer than `depth`.
        locality_strength: how sharply their heads look at their places at first.
    """

    qkv_bias: bool = False
    prefix_positions: bool = False
    local_blocks: int = 10
    locality_strength: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.anchored:
            raise ValueError(
                "ConViT cannot be anchored: the places that its heads look at do not wrap around"
            )
        if not 0 <= self.local_blocks < self.depth:
            raise ValueError(
                f"local_blocks must be fewer than depth: got {self.local_blocks} and {self.depth}"
            )


class ConViT(VisionTransformer):
    """Network of `ConViT <https://arxiv.org/abs/2103.10697>`_.

    Args:
        config: which one.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.

    Shapes:
        - input: :math:`(N, C, H, W)`
        - output: :math:`(N, K)`
    """

    config: ConViTConfig

    def __init__(self, config: ConViTConfig, num_classes: int = 1000, in_chans: int = 3) -> None:
        super().__init__(config, num_classes, in_chans)
        for module in self.modules():
            if isinstance(module, GatedPositionalSelfAttention):
                module.start_as_convolution()

    def make_attention(self, index: int) -> nn.Module:
        """Return the attention of a block."""
        config = self.config
        if index >= config.local_blocks:
            return super().make_attention(index)
        return GatedPositionalSelfAttention(
            config.dim, config.num_heads, config.locality_strength, config.qkv_bias
        )

    @property
    def join(self) -> int:
        """The block before which the class token joins the patches' tokens."""
        return self.config.local_blocks


def _row(num_heads: int, params: float, macs: float) -> Variant:
    return Variant(
        ConViT, ConViTConfig(48 * num_heads, num_heads=num_heads), params, macs, source="timm's model cards"
    )


VARIANTS = {
    "convit_tiny": _row(4, 5.711e6, 1.26e9),
    "convit_small": _row(9, 27.777e6, 5.76e9),
    "convit_base": _row(16, 86.540e6, 17.52e9),
    "convit_test": Variant(ConViT, ConViTConfig(24, 2, 4, 8, 32, local_blocks=1), size=32),
}
