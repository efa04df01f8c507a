"""ArcFace against angles worked out one by one, and its margin."""

import math

import pytest
import torch
from torch.nn import functional as F

from omniconv.losses.arcface import ArcFaceLoss, cosines


def test_cosines_do_not_depend_on_lengths():
    features, weight = torch.randn(4, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    expected = F.cosine_similarity(features[:, None], weight[None], dim=2)
    torch.testing.assert_close(cosines(features * 7, weight * 0.1), expected)


@pytest.mark.parametrize("margin", [0.0, 0.15, 0.5, 1.5])
def test_it_is_the_softmax_of_angles(margin):
    angles = torch.rand(6, 4, dtype=torch.float64) * math.pi
    targets = torch.tensor([0, 1, 2, 3, 0, 1])
    expected = 0.0
    for row, target in zip(angles.tolist(), targets.tolist(), strict=True):
        logits = [30 * math.cos(angle) for angle in row]
        moved = row[target] + margin
        if moved < math.pi:
            logits[target] = 30 * math.cos(moved)
        else:
            logits[target] = 30 * (math.cos(row[target]) - margin * math.sin(margin))
        expected += math.log(sum(math.exp(logit - logits[target]) for logit in logits)) / 6
    loss = ArcFaceLoss(margin, 30.0)(angles.cos(), targets)
    assert float(loss) == pytest.approx(expected, rel=1e-9)


def test_a_larger_margin_costs_more():
    values, targets = torch.rand(5, 4) * 2 - 1, torch.tensor([0, 1, 2, 3, 0])
    losses = [float(ArcFaceLoss(margin, 10.0)(values, targets)) for margin in (0.0, 0.2, 0.5, 1.0)]
    assert losses == sorted(losses)
