"""Segmenter with its linear decoder: a plain vision transformer whose every token is classified.

Paper: Strudel et al., Segmenter: Transformer for Semantic Segmentation, https://arxiv.org/abs/2105.05633, the variant
"Linear". The mask transformer, its other decoder, is not here.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.models.image.vit import VisionTransformer, init_weights

__all__ = ["Segmenter"]


class Segmenter(nn.Module):
    r"""Network of `Segmenter <https://arxiv.org/abs/2105.05633>`_ with the linear decoder.

    .. math:: y = \mathrm{upsample}(W\, \mathrm{LN}(z) + b)

    for the tokens z of the encoder's last block, one a patch.

    Args:
        encoder: a vision transformer, such as `create_model("vit_tiny_patch16_224")`; it becomes a part of this
            network and loses its classifier.
        classes: of the output.

    Shapes:
        - input: :math:`(N, C, H, W)`
        - output: :math:`(N, K, H, W)`
    """

    def __init__(self, encoder: VisionTransformer, classes: int) -> None:
        super().__init__()
        encoder.reset_classifier(0)
        self.encoder = encoder
        self.head = nn.Linear(encoder.num_features, classes)
        init_weights(self.head)

    def scores(self, tokens: Tensor) -> Tensor:
        """Return scores (..., K) of tokens (..., D) from the encoder's last block."""
        return self.head(self.encoder.norm(tokens))

    def paint(self, scores: Tensor, height: int, width: int) -> Tensor:
        """Return the scores (N, K, H, W) of all pixels from those of all patches, (N, L, K), in row-major order."""
        side = self.encoder.config.patch_size
        grid = (-(-height // side), -(-width // side))
        maps = scores.transpose(1, 2).unflatten(2, grid)
        maps = F.interpolate(maps, scale_factor=side, mode="bilinear")
        # Patches at the border may reach beyond the image.
        return maps[..., :height, :width]

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of every class at every pixel."""
        tokens = self.encoder.forward_tokens(x)[0][:, self.encoder.prefix_tokens :]
        return self.paint(self.scores(tokens), *x.shape[2:])
