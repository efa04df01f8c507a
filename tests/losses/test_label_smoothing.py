"""Label smoothing against torch's own, the mixed target, and the paper's gradient."""

import pytest
import torch
from torch.nn import functional as F

from omniconv.losses.label_smoothing import LabelSmoothing


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
def test_equals_torchs_form(smoothing):
    logits, targets = torch.randn(5, 7, 3), torch.randint(7, (5, 3))
    wanted = F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="none")
    torch.testing.assert_close(LabelSmoothing(smoothing, "none")(logits, targets), wanted)


def test_is_cross_entropy_with_a_mixed_target_and_its_gradient_the_difference():
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 3, 1, 1, 2, 0])
    q = 0.9 * F.one_hot(targets, 4) + 0.1 / 4
    loss = LabelSmoothing(0.1, "sum")(logits, targets)
    torch.testing.assert_close(loss, -(q * logits.log_softmax(1)).sum())
    loss.backward()
    torch.testing.assert_close(logits.grad, logits.detach().softmax(1) - q)


def test_the_minimum_is_at_finite_logits():
    # Section 7: the best logit gap is log((K - 1)(1 - eps') / eps'), eps' = eps (K - 1) / K, not infinity.
    wrong = 0.1 * 9 / 10
    best = torch.log(torch.tensor(9 * (1 - wrong) / wrong))
    gaps = torch.stack([best - 0.5, best, best + 0.5, torch.tensor(50.0)])
    logits = torch.cat([gaps[:, None], torch.zeros(4, 9)], 1)
    losses = LabelSmoothing(0.1, "none")(logits, torch.zeros(4, dtype=torch.long))
    assert losses.argmin() == 1
