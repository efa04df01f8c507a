"""Eigen-CAM: the first principal component of a layer's activations, shown as a picture.

Paper: Muhammad and Yeasin, Eigen-CAM, https://arxiv.org/abs/2008.00299. It needs no gradient and no class.
"""

import torch
from torch import Tensor, nn

from omniconv.inspect.cam.base import CamMap, Layer, activations

__all__ = ["eigen_cam", "principal_map"]


def principal_map(activation: Tensor, components: int = 1, centre: bool = False) -> Tensor:
    r"""Return the projection of every position's activations on their first right singular vectors.

    .. math:: O = U \Sigma V^\top \in \mathbb{R}^{hw \times C}, \qquad
              m = \sum_{k} \mathrm{relu}(s_k\, O v_k)

    The sign :math:`s_k`, which the decomposition leaves open, gives the positive side of each projection the
    larger energy. The vectors come from the eigenvectors of the smaller of :math:`O^\top O` and
    :math:`O O^\top` in double precision, which is exact to single precision and far cheaper than a whole
    decomposition.

    Args:
        activation: the activations O of a batch.
        components: how many singular vectors count.
        centre: subtract each channel's mean over the positions first.

    Shapes:
        - activation: :math:`(N, C, h, w)`
        - output: :math:`(N, h, w)`, float64

    Raises:
        ValueError: if `components` does not lie in 1 to min(C, h w).
    """
    _, channels, height, width = activation.shape
    rank = min(channels, height * width)
    if not 1 <= components <= rank:
        raise ValueError(f"components must lie in [1, {rank}] for this layer: got {components}")
    o = activation.flatten(2).transpose(1, 2).double()  # (N, hw, C)
    if centre:
        o = o - o.mean(1, keepdim=True)
    if channels <= height * width:
        _, vectors = torch.linalg.eigh(o.transpose(1, 2) @ o)  # eigenvalues ascend
        projection = o @ vectors[..., -components:]
    else:
        values, vectors = torch.linalg.eigh(o @ o.transpose(1, 2))
        projection = vectors[..., -components:] * values[:, None, -components:].clamp_min(0).sqrt()
    energy = (projection * projection.abs()).sum(1, keepdim=True)
    projection = torch.where(energy < 0, -projection, projection)
    return projection.relu().sum(2).unflatten(1, (height, width))


def eigen_cam(
    model: nn.Module, x: Tensor, layer: Layer = None, *, components: int = 1, centre: bool = False
) -> CamMap:
    r"""Activation map of `Eigen-CAM <https://arxiv.org/abs/2008.00299>`_: no gradient, no class.

    .. math:: L = O v_1, \qquad O = U \Sigma V^\top \in \mathbb{R}^{hw \times C}

    where O are the activations of a layer and :math:`O v_1 v_1^\top` is their best approximation of rank one.
    The map shows what the layer sees most of, whatever the classifier makes of it.

    Args:
        model: any module; its state, mode and gradients stay as they are.
        x: images (N, C, H, W), preprocessed as the model expects them.
        layer: a module of the model or its dotted name, or several, whose scaled maps are averaged; the
            module of the last feature map (`feature_info`) by default.
        components: singular vectors whose rectified projections are added; 1 in the paper.
        centre: subtract each channel's mean first, as some libraries do; the paper does not.

    Raises:
        UsageError: if there is no such layer, or it gives no feature map (N, C, h, w).
        ValueError: if `components` is larger than the rank that the layer can have.
    """
    maps = [principal_map(one, components, centre) for one in activations(model, x, layer)]
    return CamMap.combine(maps, x)
