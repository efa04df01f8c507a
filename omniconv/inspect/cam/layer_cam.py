"""LayerCAM: every position of every channel weighted by its own positive gradient.

Paper: Jiang et al., LayerCAM, https://ieeexplore.ieee.org/document/9462463.
"""

from torch import Tensor, nn

from omniconv.inspect.cam.base import CamMap, Layer, Target, gradients

__all__ = ["layer_cam"]


def layer_cam(model: nn.Module, x: Tensor, target: Target = None, layer: Layer = None) -> CamMap:
    r"""Activation map of `LayerCAM <https://ieeexplore.ieee.org/document/9462463>`_ for a class.

    .. math:: L = \mathrm{relu}\Bigl(\sum_c \mathrm{relu}\Bigl(\frac{\partial y}{\partial A_c}\Bigr)
              \odot A_c\Bigr)

    Without a mean over positions it stays sharp in shallow layers, where Grad-CAM turns to noise.

    Args:
        model: any module; its state, mode and gradients stay as they are.
        x: images (N, C, H, W), preprocessed as the model expects them.
        target: as in `grad_cam`.
        layer: as in `grad_cam`.

    Raises:
        UsageError: as `grad_cam`.
        ValueError: if `target` does not fit the model's output.
    """
    features, slopes, classes = gradients(model, x, target, layer)
    maps = [(g.relu() * a).sum(1).relu() for a, g in zip(features, slopes, strict=True)]
    return CamMap.combine(maps, x, classes)
