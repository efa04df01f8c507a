"""Label smoothing: cross-entropy with a target that is never quite certain.

Paper: Szegedy et al., Rethinking the Inception Architecture for Computer Vision, https://arxiv.org/abs/1512.00567,
section 7.
"""

import math
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.cases import LossCase, Raises

__all__ = ["LabelSmoothing"]


class LabelSmoothing(nn.Module):
    r"""Cross-entropy with smoothed labels of `Inception-v3 <https://arxiv.org/abs/1512.00567>`_ on logits.

    .. math:: L = -\sum_k q_k \log p_k, \qquad q_k = (1 - \epsilon)\, \delta_{ky} + \epsilon / K

    Its gradient with respect to the logits is :math:`p - q`, so the largest logit has no reason to grow forever.

    Args:
        smoothing: :math:`\epsilon` in [0, 1); 0 gives cross-entropy.
        reduction: "mean" or "sum" over all samples, or "none".

    Shapes:
        - logits: :math:`(N, K, *)`
        - targets, class indices: :math:`(N, *)`
        - output: scalar, or :math:`(N, *)` with reduction "none"

    Raises:
        ValueError: if an argument lies outside its range, or the shapes do not match.
    """

    def __init__(self, smoothing: float = 0.1, reduction: Literal["mean", "sum", "none"] = "mean") -> None:
        super().__init__()
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must lie in [0, 1): got {smoothing}")
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be 'mean', 'sum' or 'none': got {reduction!r}")
        self.smoothing, self.reduction = smoothing, reduction

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of `logits` against the classes `targets`."""
        if logits.ndim < 2 or targets.shape != (len(logits), *logits.shape[2:]):
            raise ValueError(
                "targets must be one class for each row of logits: "
                f"got {tuple(logits.shape)} and {tuple(targets.shape)}"
            )
        logs = F.log_softmax(logits, 1)
        right = logs.gather(1, targets.unsqueeze(1)).squeeze(1)
        loss = -(1 - self.smoothing) * right - self.smoothing * logs.mean(1)
        if self.reduction == "none":
            return loss
        return loss.mean() if self.reduction == "mean" else loss.sum()

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"smoothing={self.smoothing}, reduction={self.reduction!r}"


CASES = (
    LossCase(
        LabelSmoothing,
        {},
        inputs=((3, 5), (3,)),
        output=(),
        # p = (3/4, 1/4) and q = (19/20, 1/20).
        known=([[math.log(3), 0.0]], [0], 0.95 * math.log(4 / 3) + 0.05 * math.log(4)),
        targets="classes",
        raises=(
            Raises(ValueError, "smoothing must lie in [0, 1): got 1", {"smoothing": 1}),
            Raises(ValueError, "reduction must be 'mean', 'sum' or 'none': got 'avg'", {"reduction": "avg"}),
            Raises(
                ValueError,
                "targets must be one class for each row of logits: got (3, 4) and (2,)",
                inputs=((3, 4), (2,)),
            ),
        ),
    ),
    LossCase(
        LabelSmoothing,
        {"smoothing": 0.3, "reduction": "none"},
        inputs=((2, 4, 3, 5), (2, 3, 5)),
        output=(2, 3, 5),
        # p = (1/2, 1/2): every target gives log 2.
        known=([[0.0, 0.0], [0.0, 0.0]], [0, 1], [math.log(2), math.log(2)]),
        targets="classes",
        id="dense",
    ),
)
