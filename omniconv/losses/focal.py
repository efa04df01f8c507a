"""Focal loss: cross-entropy in which what is already right counts little.

Paper: Lin et al., Focal Loss for Dense Object Detection, https://arxiv.org/abs/1708.02002. Written in
logarithms, so that it and its gradient stay finite at any logit, and linear in the target, so that soft labels
are the mixtures of the hard ones.
"""

import math
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.cases import LossCase, Raises

__all__ = ["SigmoidFocalLoss"]


class SigmoidFocalLoss(nn.Module):
    r"""Binary focal loss of `RetinaNet <https://arxiv.org/abs/1708.02002>`_ on logits.

    .. math:: \mathrm{FL}(p_t) = -\alpha_t (1 - p_t)^\gamma \log p_t, \qquad
              p_t = \sigma(z)\ \text{if}\ y = 1,\ \text{else}\ 1 - \sigma(z)

    with :math:`\alpha_t = \alpha` where y = 1 and :math:`1 - \alpha` elsewhere. The paper divides the sum by the
    number of objects: take `reduction="sum"` and divide.

    Args:
        alpha: weight of the positive class, in [0, 1]; None weighs both classes with 1.
        gamma: focus :math:`\gamma \ge 0`; 0 gives (weighted) cross-entropy.
        reduction: "mean" or "sum" over all elements, or "none".

    Shapes:
        - logits z and targets y (0, 1 or between, of the logits' type): :math:`(*)`, the same
        - output: scalar, or :math:`(*)` with reduction "none"

    Raises:
        ValueError: if an argument lies outside its range, or the shapes differ.
    """

    def __init__(
        self,
        alpha: float | None = 0.25,
        gamma: float = 2.0,
        reduction: Literal["mean", "sum", "none"] = "mean",
    ) -> None:
        super().__init__()
        if alpha is not None and not 0 <= alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1] or be None: got {alpha}")
        if gamma < 0:
            raise ValueError(f"gamma must not be negative: got {gamma}")
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be 'mean', 'sum' or 'none': got {reduction!r}")
        self.alpha, self.gamma, self.reduction = alpha, gamma, reduction

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of `logits` against `targets`."""
        if logits.shape != targets.shape:
            raise ValueError(
                f"logits and targets must have one shape: got {tuple(logits.shape)} and {tuple(targets.shape)}"
            )
        positive, negative = (1.0, 1.0) if self.alpha is None else (self.alpha, 1 - self.alpha)
        # softplus(-z) = -log p and softplus(z) = -log(1 - p), so (1 - p)^gamma = exp(-gamma softplus(z)).
        missed, false = F.softplus(-logits), F.softplus(logits)
        loss = positive * targets * (-self.gamma * false).exp() * missed
        loss = loss + negative * (1 - targets) * (-self.gamma * missed).exp() * false
        if self.reduction == "none":
            return loss
        return loss.mean() if self.reduction == "mean" else loss.sum()

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"alpha={self.alpha}, gamma={self.gamma}, reduction={self.reduction!r}"


CASES = (
    LossCase(
        SigmoidFocalLoss,
        {},
        inputs=((3, 4, 5), (3, 4, 5)),
        output=(),
        # At z = 0, p = 1/2: alpha (1/2)^2 log 2 for the positive, (1 - alpha) (1/2)^2 log 2 for the negative.
        known=([0.0, 0.0], [1.0, 0.0], math.log(2) / 8),
        targets="binary",
        raises=(
            Raises(ValueError, "alpha must lie in [0, 1] or be None: got 2", {"alpha": 2}),
            Raises(ValueError, "gamma must not be negative: got -1", {"gamma": -1}),
            Raises(ValueError, "reduction must be 'mean', 'sum' or 'none': got 'avg'", {"reduction": "avg"}),
            Raises(
                ValueError,
                "logits and targets must have one shape: got (3, 4) and (3,)",
                inputs=((3, 4), (3,)),
            ),
        ),
    ),
    LossCase(
        SigmoidFocalLoss,
        {"alpha": None, "gamma": 0.5, "reduction": "none"},
        inputs=((2, 7), (2, 7)),
        output=(2, 7),
        # p = 3/4: (1/4)^(1/2) log(4/3) if positive, (3/4)^(1/2) log 4 if negative.
        known=(
            [math.log(3), math.log(3)],
            [1.0, 0.0],
            [math.log(4 / 3) / 2, math.sqrt(3) / 2 * math.log(4)],
        ),
        targets="binary",
        id="half",
    ),
)
