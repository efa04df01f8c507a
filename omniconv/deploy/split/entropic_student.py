"""Entropic student: a small encoder learns what a teacher's features need of an image, priced in bits.

Paper: Matsubara et al., Supervised Compression for Resource-Constrained Edge Computing Systems,
https://arxiv.org/abs/2108.11898. As in the authors' code the normalisations are the simplified ones (GDN1) and the
replaced layer's own error counts as well; the density starts narrower. Stage 1 is `distill_head` with the price of a
bit, stage 2 `distill_tail`.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from omniconv.deploy.split.network import Parts
from omniconv.layers.factorized_prior import FactorizedPrior
from omniconv.layers.norm.gdn import GeneralizedDivisiveNorm

__all__ = ["EntropicBottleneck"]

_STRIDES = {1: (1, 1), 2: (2, 1), 4: (2, 2), 8: (4, 2), 16: (4, 4)}


def _gdn(channels: int, inverse: bool = False) -> GeneralizedDivisiveNorm:
    return GeneralizedDivisiveNorm(channels, inverse=inverse, simplified=True)


@dataclass(frozen=True)
class EntropicBottleneck:
    """Bottleneck of the `entropic student <https://arxiv.org/abs/2108.11898>`_, for `split`.

    Encoder, from the image: 5x5, 5x5 and 2x2 convolutions to 4 L, 2 L and L channels with GDN between, the first two
    with the strides that lead to the replaced layer's resolution. Decoder, to its T channels: 2x2 convolutions to 2 T,
    T and T with inverse GDN between. A factorised prior prices and codes the rounded latent. Before distillation the
    prior has no frequencies to code with; `distill_head` ends with making them.

    Attributes:
        channels: L, of the latent; 24 in the paper.

    Raises:
        ValueError: if the layer's size is not the image's over 1, 2, 4, 8 or 16, rounded up.
    """

    channels: int = 24

    def __call__(self, image: Tensor, early: Tensor, target: Tensor) -> Parts:
        """Return new parts for a layer that makes `target` of `image`."""
        sizes = tuple(image.shape[2:]), tuple(target.shape[2:])
        fitting = [r for r in _STRIDES if all(-(-old // r) == new for old, new in zip(*sizes, strict=True))]
        if not fitting:
            raise ValueError(
                f"the layer must have 1/1, 1/2, 1/4, 1/8 or 1/16 of the image's size: got {sizes[1]} of {sizes[0]}"
            )
        first, second = _STRIDES[fitting[0]]
        latent, wide = self.channels, target.shape[1]
        encoder = nn.Sequential(
            nn.Conv2d(image.shape[1], 4 * latent, 5, first, padding=2, bias=False),
            _gdn(4 * latent),
            nn.Conv2d(4 * latent, 2 * latent, 5, second, padding=2, bias=False),
            _gdn(2 * latent),
            nn.Conv2d(2 * latent, latent, 2, bias=False),
        )
        # 2x2 convolutions take a row away, or add one where padded: one less on the wire, and as many again here.
        decoder = nn.Sequential(
            nn.Conv2d(latent, 2 * wide, 2, padding=1, bias=False),
            _gdn(2 * wide, inverse=True),
            nn.Conv2d(2 * wide, wide, 2, bias=False),
            _gdn(wide, inverse=True),
            nn.Conv2d(wide, wide, 2, padding=1, bias=False),
        )
        return Parts(encoder, FactorizedPrior(latent, init_scale=2.0), decoder, reads_image=True)
