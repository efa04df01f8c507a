import math

import pytest
import torch
from torch.nn import functional as F

from omniconv.losses.focal import SigmoidFocalLoss


def by_definition(logits, targets, alpha, gamma):
    """The paper's equation 5, number by number."""
    values = []
    for z, y in zip(logits.tolist(), targets.tolist(), strict=True):
        p = 1 / (1 + math.exp(-z))
        p_t, alpha_t = (p, alpha) if y == 1 else (1 - p, 1 - alpha)
        values.append(-alpha_t * (1 - p_t) ** gamma * math.log(p_t))
    return torch.tensor(values)


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.5, 0.5), (0.9, 5.0)])
def test_equals_the_papers_equation(alpha, gamma):
    logits = torch.linspace(-6, 6, 14)
    targets = torch.tensor([0.0, 1.0] * 7)
    loss = SigmoidFocalLoss(alpha, gamma, reduction="none")
    torch.testing.assert_close(loss(logits, targets), by_definition(logits, targets, alpha, gamma))


def test_without_focus_and_weight_it_is_cross_entropy():
    logits, targets = torch.randn(5, 3), torch.randint(2, (5, 3)).float()
    wanted = F.binary_cross_entropy_with_logits(logits, targets)
    torch.testing.assert_close(SigmoidFocalLoss(None, 0.0)(logits, targets), wanted)


def test_papers_example_of_easy_and_hard():
    # Section 3.2: with gamma = 2, p_t = 0.9 weighs 100 times less than in cross-entropy, p_t about 0.968 1000
    # times, and a misclassified p_t <= 0.5 at most 4 times less.
    logits = torch.tensor([0.9, 0.968, 0.5]).logit()
    ones = torch.ones(3)
    focal = SigmoidFocalLoss(None, 2.0, reduction="none")(logits, ones)
    ratio = F.binary_cross_entropy_with_logits(logits, ones, reduction="none") / focal
    torch.testing.assert_close(ratio, torch.tensor([100.0, 976.5625, 4.0]), rtol=1e-3, atol=0)


def test_gradient_vanishes_for_what_is_right_and_not_for_what_is_wrong():
    logits = torch.tensor([80.0, -80.0, -80.0, 80.0], requires_grad=True)
    SigmoidFocalLoss(None, 2.0, reduction="sum")(logits, torch.tensor([1.0, 0.0, 1.0, 0.0])).backward()
    torch.testing.assert_close(logits.grad, torch.tensor([0.0, 0.0, -1.0, 1.0]))


def test_soft_labels_mix_the_hard_ones():
    logits = torch.randn(6)
    loss = SigmoidFocalLoss(0.3, 1.5, reduction="none")
    mixed = 0.7 * loss(logits, torch.ones(6)) + 0.3 * loss(logits, torch.zeros(6))
    torch.testing.assert_close(loss(logits, torch.full((6,), 0.7)), mixed)
