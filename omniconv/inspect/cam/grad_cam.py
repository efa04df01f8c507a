"""Grad-CAM: activation maps weighted by the mean gradient of a class score.

Paper: Selvaraju et al., Grad-CAM, https://arxiv.org/abs/1610.02391.
"""

from torch import Tensor, nn

from omniconv.inspect.cam.base import CamMap, Layer, Target, gradients

__all__ = ["grad_cam"]


def grad_cam(model: nn.Module, x: Tensor, target: Target = None, layer: Layer = None) -> CamMap:
    r"""Activation map of `Grad-CAM <https://arxiv.org/abs/1610.02391>`_ for a class.

    .. math:: L = \mathrm{relu}\Bigl(\sum_c \alpha_c A_c\Bigr), \qquad
              \alpha_c = \frac{1}{hw} \sum_{i,j} \frac{\partial y}{\partial A_{cij}}

    Args:
        model: any module; its state, mode and gradients stay as they are.
        x: images (N, C, H, W), preprocessed as the model expects them.
        target: a class, one class a sample, or a function from the model's output to scores (N,); the class
            that the model puts first by default.
        layer: a module of the model or its dotted name, or several, whose scaled maps are averaged; the
            module of the last feature map (`feature_info`) by default.

    Raises:
        UsageError: if there is no such layer, it gives no feature map, or the score does not depend on it.
        ValueError: if `target` does not fit the model's output.
    """
    features, slopes, classes = gradients(model, x, target, layer)
    maps = [(g.mean((2, 3), keepdim=True) * a).sum(1).relu() for a, g in zip(features, slopes, strict=True)]
    return CamMap.combine(maps, x, classes)
