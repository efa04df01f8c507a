"""Shape bias: what a network goes by where the shape of an object says one class and its texture another.

Paper: Geirhos et al., ImageNet-trained CNNs are biased towards texture, https://arxiv.org/abs/1811.12231.
"""

import torch
from torch import Tensor, nn

__all__ = ["shape_bias"]


@torch.no_grad()
def shape_bias(model: nn.Module, images: Tensor, shapes: Tensor, textures: Tensor) -> float:
    """Return, of the decisions for either cue, the share for the shape; NaN if there is none.

    Args:
        model: gives logits (N, K). It is run in the mode that it is in.
        images: pictures (N, C, H, W) whose two cues are in conflict.
        shapes: the classes (N) that the shapes stand for.
        textures: those that the textures stand for.

    Raises:
        ValueError: if the cues of a picture agree.
    """
    if bool((shapes == textures).any()):
        raise ValueError("shapes and textures must differ in every picture: the cues of some agree")
    decisions = model(images).argmax(1)
    shape, texture = int((decisions == shapes).sum()), int((decisions == textures).sum())
    return shape / (shape + texture) if shape + texture else float("nan")
