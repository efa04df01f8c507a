"""ArcFace: softmax over cosines, in which the right class must win by an angle.

Paper: Deng et al., ArcFace, https://arxiv.org/abs/1801.07698.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.cases import LossCase, Raises

__all__ = ["ArcFaceLoss", "cosines"]


def cosines(features: Tensor, weight: Tensor) -> Tensor:
    """Return the cosines (N, K) of features (N, C) with the rows of a classifier's weight (K, C)."""
    return F.linear(F.normalize(features), F.normalize(weight))


class ArcFaceLoss(nn.Module):
    r"""Additive angular margin loss of `ArcFace <https://arxiv.org/abs/1801.07698>`_ on `cosines`.

    .. math:: L = -\log \frac{e^{s \cos(\theta_y + m)}}
              {e^{s \cos(\theta_y + m)} + \sum_{j \ne y} e^{s \cos \theta_j}}

    Where :math:`\theta_y + m > \pi`, beyond which the cosine would rise again, :math:`\cos \theta_y - m \sin m`
    takes its place.

    Args:
        margin: m in radians, in [0, pi).
        scale: s, positive.

    Shapes:
        - cosines of all classes :math:`(N, K)`; targets, the right classes: :math:`(N)`
        - output: scalar, the mean

    Raises:
        ValueError: if an argument lies outside its range.
    """

    def __init__(self, margin: float = 0.5, scale: float = 64.0) -> None:
        super().__init__()
        if not 0 <= margin < math.pi:
            raise ValueError(f"margin must lie in [0, pi): got {margin}")
        if scale <= 0:
            raise ValueError(f"scale must be positive: got {scale}")
        self.margin, self.scale = margin, scale

    def forward(self, cosines: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of `cosines` against `targets`."""
        cosine = cosines.clamp(-1, 1)
        # The root's slope is infinite at cosines of one, where the classes are learned already.
        sine = (1 - cosine * cosine).clamp(min=1e-6).sqrt()
        moved = cosine * math.cos(self.margin) - sine * math.sin(self.margin)
        low = cosine - self.margin * math.sin(self.margin)
        moved = torch.where(cosine > math.cos(math.pi - self.margin), moved, low)
        right = targets[:, None] == torch.arange(cosine.shape[1], device=targets.device)
        return F.cross_entropy(self.scale * torch.where(right, moved, cosine), targets)

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"margin={self.margin}, scale={self.scale}"


CASES = (
    LossCase(
        ArcFaceLoss,
        {"margin": math.pi / 6, "scale": 2 * math.log(3)},
        inputs=((5, 4), (5,)),
        output=(),
        # 60 degrees and 30 more: -log(e^0 / (e^0 + e^(s / 2))) = log(1 + 3).
        known=([[0.5, 0.5]], [0], math.log(4)),
        targets="classes",
        raises=(
            Raises(ValueError, "margin must lie in [0, pi): got 4", {"margin": 4}),
            Raises(ValueError, "scale must be positive: got 0", {"scale": 0}),
        ),
    ),
)
