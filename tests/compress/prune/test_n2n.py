"""N2N: rewards by hand, students that always run, policies that learn which layers matter."""

import pytest
import torch
from torch import nn

import omniconv
from omniconv.compress.prune.n2n import (
    Reinforce,
    RemovalPolicy,
    ShrinkPolicy,
    distillation_loss,
    layer_states,
    n2n,
    n2n_reward,
    removable_blocks,
    remove_blocks,
    shrink,
)
from omniconv.compress.structure.graph import trace_structure
from omniconv.testing.harness import seeded


def plain():
    """Return six convolutions, three of which keep the shape."""

    def block(inputs, outputs, stride=1):
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU())

    widths = ((1, 8, 1), (8, 8, 1), (8, 16, 2), (16, 16, 1), (16, 16, 1), (16, 24, 2))
    return nn.Sequential(
        *(block(*w) for w in widths), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10)
    )


def test_rewards_by_hand():
    assert n2n_reward(100, 100, 0.9, 0.9) == 0
    assert n2n_reward(0, 100, 0.9, 0.9) == 1
    assert n2n_reward(50, 100, 0.45, 0.9) == pytest.approx(0.75 / 2)
    logits, teacher = torch.zeros(1, 2), torch.tensor([[1.0, 3.0]])
    assert float(distillation_loss(logits, teacher, torch.tensor([0]))) == pytest.approx(5 + 0.6931472)


def test_blocks_that_keep_the_shape_are_found():
    assert removable_blocks(plain(), (1, 8, 10)) == ["1", "3", "4"]
    # Of a residual network whole blocks; of those that change the shape the layers that do not.
    blocks = removable_blocks(omniconv.create_model("resnet_test"), (3, 40, 48))
    assert {"layer1.0", "layer2.0.conv2", "layer2.1"} < set(blocks)
    assert not {"layer1", "layer1.0.conv1", "layer2.0", "layer2.0.conv1", "layer2.1.conv2"} & set(blocks)
    assert not removable_blocks(nn.Sequential(nn.Linear(3, 4)), (3,))


def test_states_tell_layers_apart():
    states = layer_states(plain(), ["1", "3", "8"])
    assert states.shape == (3, 6)
    assert states[0].tolist() == pytest.approx([1, 3 / 5, 1 / 2, 1 / 2, 3 / 8, 1 / 4])
    assert states[2, :4].tolist() == [0, 0, 0, 0]


def test_whatever_is_sampled_runs():
    model, x = plain().eval(), torch.randn(2, 1, 8, 10)
    blocks = removable_blocks(model, (1, 8, 10))
    with seeded():
        removal, shrinkage = RemovalPolicy(), ShrinkPolicy()
        for _ in range(4):
            kept, _ = removal.sample(layer_states(model, blocks))
            smaller = remove_blocks(model, dict(zip(blocks, kept.tolist(), strict=True)))
            structure = trace_structure(smaller, (1, 8, 10))
            shares, log = shrinkage.sample(layer_states(smaller, list(structure.groups)))
            assert bool(((shares >= 0.1) & (shares <= 1)).all())
            assert float(log.detach()) < 0
            student = shrink(smaller, structure, dict(zip(structure.groups, shares.tolist(), strict=True)))
            assert student(x).shape == (2, 10)


@pytest.mark.parametrize("policy", [RemovalPolicy, ShrinkPolicy])
def test_policies_learn(policy):
    """Only the first of three layers is worth keeping."""
    states = layer_states(plain(), ["1", "3", "4"])
    wish = torch.tensor([1.0, 0.0, 0.0])
    with seeded():
        search = Reinforce(policy(), lr=2e-2)
        rewards = [search.update(states, lambda c: -float((c.float() - wish).abs().sum())) for _ in range(40)]
    first, last = (sum(map(sum, part)) / len(part) for part in (rewards[:8], rewards[-8:]))
    assert last > first / 2


def test_the_best_student_is_returned():
    model, trained = plain(), []
    # Only the number of blocks counts: all that can go should go, without a width of the rest.
    with seeded():
        student, report = n2n(
            model, lambda m: 0.9, (1, 8, 10), train=trained.append, steps=3, rollouts=4, smallest=0.01
        )
    assert sum(p.numel() for p in student.parameters()) < 0.5 * sum(p.numel() for p in model.parameters())
    assert student(torch.randn(2, 1, 8, 10)).shape == (2, 10)
    assert 0 < len(trained) <= 24
    assert "Reward of the best student" in report.notes[0]
    same, _ = n2n(model, lambda m: 0.9, (1, 8, 10), steps=1, rollouts=2, smallest=1.1)
    assert sum(p.numel() for p in same.parameters()) == sum(p.numel() for p in model.parameters())


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="no block of this model can be removed"):
        n2n(nn.Sequential(nn.Linear(3, 4)), lambda m: 1.0, (3,))
