"""N2N's policies learn which layers to remove, what they learn helps with a larger teacher, and a student a fifth as
large as its teacher is found that is nearly as accurate.

Search and transfer replace the training of students by an oracle: accuracy is 0.9, and halves for each of some layers
that is gone. Search has 12 layers, a third of which matter, 300 updates of 5 samples, and is compared with samples that
keep each layer by a coin. Transfer pretrains on 4 layers for 100 updates and counts updates until the mean reward of
the last 5 is 95% of the best that 6 layers allow; in both the first and the last layer matter. End to end, a network
of six convolutions is the teacher on scikit-learn's digits (12 epochs), with 1,100 pictures for training and 200 for
rewards; 40 students train for an epoch each, and the best one for 8 more, all by distillation.
"""

import copy
import itertools
import statistics

import torch
from torch import Tensor, nn

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
from omniconv.compress.report import weight_layers
from omniconv.compress.structure.graph import trace_structure
from omniconv.core.seeds import derive
from omniconv.papers.check import Check
from omniconv.papers.small import Split, accuracy, digits, train

SEEDS = (0, 1, 2)
SAMPLES = 200
GAIN = 1.2
SMALLER = 5.0
WITHIN = -3.0
UPDATES, PRETRAIN, LONGEST = 300, 100, 300
REACHED = 0.95
SHAPE = (1, 8, 8)
RECIPE = {"batch": 64, "shift": 1, "flip": False}


def network(*widths: tuple[int, int, int]) -> nn.Sequential:
    """Return convolutions of given inputs, outputs and stride, each with norm and ReLU, and a classifier."""
    blocks = [
        nn.Sequential(nn.Conv2d(i, o, 3, s, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
        for i, o, s in widths
    ]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1][1], 10))


def teacher_network() -> nn.Sequential:
    """Return six convolutions, three of which keep their shape."""
    return network((1, 24, 1), (24, 24, 1), (24, 32, 2), (32, 32, 1), (32, 32, 1), (32, 32, 2))


class Oracle:
    """Rewards of a network whose accuracy halves for each important layer that is gone."""

    def __init__(self, layers: int, important: tuple[int, ...]) -> None:
        widths = [8 * 2 ** (3 * i // layers) for i in range(layers)]
        model = network(*((a, b, 1) for a, b in itertools.pairwise([1, *widths])))
        self.states = layer_states(model, [str(i) for i in range(layers)])
        weights = [layer.weight.numel() for layer in weight_layers(model).values()]
        self.weights, self.important = torch.tensor(weights[:layers]), torch.tensor(important)
        self.best = max(self(torch.tensor(kept)) for kept in itertools.product((False, True), repeat=layers))

    def __call__(self, kept: Tensor) -> float:
        """Return the reward of the layers that stay; -1 if none does."""
        if not kept.any():
            return -1.0
        gone = int((~kept[self.important]).sum())
        return n2n_reward(int(self.weights[kept].sum()), int(self.weights.sum()), 0.9 * 0.5**gone, 0.9)


def algebra(check: Check) -> None:
    """Rewards by hand, students that earn nothing, and samples that all run."""
    rewards = [n2n_reward(parameters, 100, 0.9, 0.9) for parameters in (100, 50, 0)]
    off = max(abs(a - b) for a, b in zip(rewards, (0.0, 0.75, 1.0), strict=True))
    check.require("reward at 0, 50 and 100% saved, off 0, 0.75 and 1", off, "<=", 1e-12)
    model = teacher_network()
    torch.manual_seed(0)
    same, _ = n2n(model, lambda m: 0.9, SHAPE, steps=1, smallest=1.01)
    kept = sum(p.numel() for p in same.parameters()) / sum(p.numel() for p in model.parameters())
    check.require("share of the teacher that stays if all students are too small", kept, "==", 1)
    x, right = torch.randn(2, *SHAPE), 0
    blocks = removable_blocks(model, SHAPE)
    for _ in range(SAMPLES // 20):
        choice, _ = RemovalPolicy().sample(layer_states(model, blocks))
        smaller = remove_blocks(model, dict(zip(blocks, choice.tolist(), strict=True)))
        structure = trace_structure(smaller, SHAPE)
        states = layer_states(smaller, list(structure.groups))
        for _ in range(20):
            shares, _ = ShrinkPolicy().sample(states)
            student = shrink(smaller, structure, dict(zip(structure.groups, shares.tolist(), strict=True)))
            right += student(x).shape == (2, 10)
    check.require(f"samples that run, of {SAMPLES}", right, "==", SAMPLES)


def search(seed: int) -> tuple[float, float]:
    """Return the mean reward of a trained policy and of random choices."""
    oracle = Oracle(12, (0, 4, 7, 11))
    torch.manual_seed(derive(seed, "search"))
    learned = Reinforce(RemovalPolicy())
    for _ in range(UPDATES):
        learned.update(oracle.states, oracle)
    with torch.no_grad():
        trained = [oracle(learned.policy.sample(oracle.states)[0]) for _ in range(200)]
    random = [oracle(torch.rand(12) < 0.5) for _ in range(5 * UPDATES)]
    return statistics.mean(trained), statistics.mean(random)


def updates_needed(policy: RemovalPolicy, oracle: Oracle) -> int:
    """Return after how many updates the mean reward reaches what is asked for."""
    learned, last = Reinforce(policy), []
    for step in range(1, LONGEST + 1):
        last = [*last[-4:], statistics.mean(learned.update(oracle.states, oracle))]
        if len(last) == 5 and statistics.mean(last) >= REACHED * oracle.best:
            return step
    return LONGEST


def transfer(seed: int) -> tuple[int, int]:
    """Return the updates that a pretrained and a fresh policy need."""
    small, large = Oracle(4, (0, 3)), Oracle(6, (0, 5))
    torch.manual_seed(derive(seed, "transfer"))
    policy = RemovalPolicy()
    fresh = copy.deepcopy(policy)
    pretrained = Reinforce(policy)
    for _ in range(PRETRAIN):
        pretrained.update(small.states, small)
    return updates_needed(policy, large), updates_needed(fresh, large)


def distil(student: nn.Module, teacher: nn.Module, data: Split, epochs: float, seed: int) -> None:
    """Train a student on labels and on what its teacher says of the same pictures."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student = student

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                wanted = teacher(x)
            return torch.stack((self.student(x), wanted))

    train(
        Both(), data, epochs=epochs, seed=seed, lr=3e-3,
        loss=lambda both, labels: distillation_loss(both[0], both[1], labels), **RECIPE,
    )  # fmt: skip


def student_of(seed: int, data: Split, test: Split) -> tuple[float, float, float]:
    """Return how much smaller the best student is, its accuracy and its teacher's."""
    torch.manual_seed(derive(seed, "teacher"))
    teacher = teacher_network()
    train(teacher, data, epochs=12.0, seed=seed, **RECIPE)
    teacher.eval()
    known, held = (data[0][:1100], data[1][:1100]), (data[0][1100:], data[1][1100:])
    student, report = n2n(
        teacher,
        lambda m: accuracy(m, held),
        SHAPE,
        train=lambda m: distil(m, teacher, known, 1.0, seed),
        steps=4,
        smallest=0.02,
    )
    distil(student, teacher, data, 8.0, seed)
    ratio = report.before.parameters / report.after.parameters
    return ratio, accuracy(student, test), accuracy(teacher, test)


def run(check: Check) -> None:
    """Measure the four parts."""
    algebra(check)
    trained, random = (statistics.mean(values) for values in zip(*map(search, SEEDS), strict=True))
    text = f"mean reward after {UPDATES} updates beside that of random choices, mean of {len(SEEDS)} seeds"
    check.require(text, trained / random, ">=", GAIN, baseline=random)
    pretrained, fresh = (statistics.mean(values) for values in zip(*map(transfer, SEEDS), strict=True))
    text = f"updates that a pretrained policy needs, mean of {len(SEEDS)} seeds"
    check.require(text, pretrained, "<", fresh, baseline=fresh)
    data, test = digits()
    found = [student_of(seed, data, test) for seed in SEEDS]
    ratio, student, teacher = (statistics.mean(values) for values in zip(*found, strict=True))
    check.require(
        f"parameters of the teacher over the best student's, mean of {len(SEEDS)} seeds", ratio, ">=", SMALLER
    )
    check.require(
        f"accuracy of the best student above its teacher's, mean of {len(SEEDS)} seeds",
        student - teacher, ">=", WITHIN, baseline=teacher, unit="points",
    )  # fmt: skip
    check.note(f"Smaller by, student's and teacher's accuracy: {found}")
