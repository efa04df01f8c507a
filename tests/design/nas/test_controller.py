"""The controller against its own probabilities, and its training against a reward that is known."""

import torch

from omniconv.design.nas.controller import Controller, ControllerTrainer, choice_sizes, decode, random_choices
from omniconv.models.image.nasnet import NASNet, NASNetConfig


def test_choices_lie_in_their_ranges_and_are_drawn_with_the_stated_probability():
    torch.manual_seed(0)
    controller = Controller(blocks=2, hidden=8)
    choices, logs = controller.sample(4000, torch.Generator().manual_seed(1))
    assert (choices < torch.tensor(choice_sizes(2))).all()
    assert (choices >= 0).all()
    again, entropies = controller(choices)
    torch.testing.assert_close(again, logs)
    # The first choice has two values; its frequency and entropy are those of its probability.
    p = logs[choices[:, 0] == 1, 0][0].exp()
    assert abs((choices[:, 0] == 1).float().mean() - p) < 0.03
    torch.testing.assert_close(entropies[0, 0], -(p * p.log() + (1 - p) * (1 - p).log()))


def test_training_finds_what_is_rewarded():
    torch.manual_seed(0)
    controller = Controller(blocks=1, hidden=16)
    trainer = ControllerTrainer(controller, lambda choices: (choices[:, 2] == 4).float(), lr=0.03)
    generator = torch.Generator().manual_seed(0)
    before = sum(trainer.step(generator) for _ in range(3)) / 3
    for _ in range(30):
        after = trainer.step(generator)
    assert before < 0.4
    assert after > 0.9


def test_every_drawn_genotype_builds_and_runs():
    generator = torch.Generator().manual_seed(2)
    for row in random_choices(4, generator=generator):
        genotype = decode(row)
        model = NASNet(NASNetConfig(1, 4, 6, "keep", genotype=genotype), 3, 2).eval()
        assert model(torch.randn(1, 2, 13, 18)).shape == (1, 3)
        # Every block's state is read or put out, so no part is idle.
        for cell in genotype:
            read = {state for block in cell.blocks for state in (block.left, block.right)}
            assert read | set(cell.outputs) == set(range(7))
