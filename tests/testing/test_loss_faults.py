"""The contract catches losses that are broken on purpose, each by the check meant for it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from omniconv.core.cases import LossCase, Raises
from omniconv.testing import losses


class Toy(nn.Module):
    """A correct loss: binary cross-entropy on logits."""

    def __init__(self, reduction="mean"):
        super().__init__()
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be 'mean', 'sum' or 'none': got {reduction!r}")
        self.reduction = reduction

    def single(self, z, y):
        return F.softplus(z) - z * y

    def forward(self, z, y):
        loss = self.single(z, y)
        return loss if self.reduction == "none" else loss.mean() if self.reduction == "mean" else loss.sum()


class WrongValue(Toy):
    def single(self, z, y):
        return super().single(z, y) * 1.01


class ForcesDouble(Toy):
    def forward(self, z, y):
        return super().forward(z.double(), y.double())


class LosesGradient(Toy):
    def single(self, z, y):
        return F.softplus(z) - z.detach() * y


class Overflows(Toy):
    def single(self, z, y):
        p = z.sigmoid()
        return -(y * p.log() + (1 - y) * (1 - p).log())


class MeansOverBatch(Toy):
    def forward(self, z, y):
        return self.single(z, y).sum() / len(z) if self.reduction == "mean" else super().forward(z, y)


class ChangesTargets(Toy):
    def single(self, z, y):
        return super().single(z, y.mul_(2).div_(2))


class KeepsLambda(Toy):
    def __init__(self, reduction="mean"):
        super().__init__(reduction)
        self.soft = lambda z: F.softplus(z)


class Specialises(Toy):
    def single(self, z, y):
        return super().single(z, y) * (1 if z.shape[0] == 3 else 1.0)


class FreshMemory(Toy):
    def single(self, z, y):
        return super().single(z, y) + 0 * torch.empty_like(z)


class Silent(Toy):
    def __init__(self, reduction="mean"):
        super().__init__("mean" if reduction == "avg" else reduction)


def case(make):
    return LossCase(
        make,
        {},
        inputs=((3, 4), (3, 4)),
        output=(),
        known=([0.0], [1.0], 0.6931471805599453),
        targets="binary",
        raises=(
            Raises(ValueError, "reduction must be 'mean', 'sum' or 'none': got 'avg'", {"reduction": "avg"}),
        ),
    )


FAULTS = [
    (ForcesDouble, losses.output_shape_and_dtype, "torch.float64"),
    (WrongValue, losses.known_value, "value: values differ"),
    (LosesGradient, losses.gradient_is_right, "Jacobian mismatch"),
    (Overflows, losses.finite_at_extreme_predictions, "is not finite"),
    (MeansOverBatch, losses.reduction_reduces, "reduction='mean': values differ"),
    (ChangesTargets, losses.inputs_unmodified, "changed in place"),
    (KeepsLambda, losses.copies_and_state, "lambda"),
    (Specialises, losses.compiles_once, "needs a new graph"),
    (FreshMemory, losses.reads_no_fresh_memory, "write what torch.empty gives"),
    (Silent, losses.fails_by_name, "is accepted"),
]


@pytest.mark.parametrize(("make", "check", "words"), FAULTS, ids=[m.__name__ for m, _, _ in FAULTS])
def test_broken_loss_is_caught(assert_caught, make, check, words):
    assert_caught(check, case(make), words)


def test_every_loss_check_has_a_fault():
    assert {check for _, check, _ in FAULTS} == set(losses.LOSS_CHECKS)


def test_correct_loss_passes():
    losses.check_loss(case(Toy))
