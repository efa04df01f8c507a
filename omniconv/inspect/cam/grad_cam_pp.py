"""Grad-CAM++: every position's gradient has its own weight, so that several objects all count.

Paper: Chattopadhyay et al., Grad-CAM++, https://arxiv.org/abs/1710.11063.
"""

import torch
from torch import Tensor, nn

from omniconv.inspect.cam.base import CamMap, Layer, Target, gradients

__all__ = ["grad_cam_pp"]


def _map(a: Tensor, g: Tensor) -> Tensor:
    below = 2 * g**2 + a.sum((2, 3), keepdim=True) * g**3
    alpha = torch.where(below != 0, g**2 / torch.where(below != 0, below, 1), 0)
    return ((alpha * g.relu()).sum((2, 3), keepdim=True) * a).sum(1).relu()


def grad_cam_pp(model: nn.Module, x: Tensor, target: Target = None, layer: Layer = None) -> CamMap:
    r"""Activation map of `Grad-CAM++ <https://arxiv.org/abs/1710.11063>`_ for a class.

    .. math:: L = \mathrm{relu}\Bigl(\sum_c w_c A_c\Bigr), \qquad
              w_c = \sum_{i,j} \alpha_{cij}\, \mathrm{relu}(g_{cij}), \qquad
              \alpha_{cij} = \frac{g_{cij}^2}{2 g_{cij}^2 + g_{cij}^3 \sum_{a,b} A_{cab}}

    where :math:`g = \partial y / \partial A`. The score is :math:`e^y` in the paper, whose powers of the
    gradient these are; its own factor goes when the map is scaled.

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
    maps = [_map(a.double(), g.double()) for a, g in zip(features, slopes, strict=True)]
    return CamMap.combine(maps, x, classes)
