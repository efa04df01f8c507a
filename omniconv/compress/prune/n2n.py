"""N2N: two recurrent policies learn by trial which layers a network can do without and how narrow the rest may be.

Paper: Ashok et al., N2N Learning, https://arxiv.org/abs/1709.06030. Layers to remove are here blocks that return the
shape that they read; widths are the groups of `trace_structure`. A student starts from its teacher's weights, of which
the units of largest norm stay, where the paper's starts anew.
"""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from omniconv.compress.prune.structured import unit_norms
from omniconv.compress.report import CompressionReport, compare, weight_layers
from omniconv.compress.structure.graph import Structure, trace_structure

__all__ = [
    "Reinforce",
    "RemovalPolicy",
    "ShrinkPolicy",
    "distillation_loss",
    "layer_states",
    "n2n",
    "n2n_reward",
    "removable_blocks",
    "remove_blocks",
    "shrink",
]

M = TypeVar("M", bound=nn.Module)

_FEATURES = 6


def n2n_reward(parameters: int, before: int, accuracy: float, teacher: float) -> float:
    r"""Return the reward of a student.

    .. math:: R = C (2 - C) \frac{A}{A_{\text{teacher}}}, \qquad C = 1 - \frac{P}{P_{\text{teacher}}}

    Args:
        parameters: of the student.
        before: of the teacher.
        accuracy: of the student.
        teacher: accuracy of the teacher.
    """
    saved = 1 - parameters / before
    return saved * (2 - saved) * accuracy / teacher


def distillation_loss(logits: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Return the mean square distance to the teacher's logits plus the cross-entropy."""
    return F.mse_loss(logits, teacher) + F.cross_entropy(logits, labels)


class RemovalPolicy(nn.Module):
    """Reads all layers in both directions and says for each how likely it is kept: two LSTMs of 30 units."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.LSTM(_FEATURES, 30, 2, bidirectional=True)
        self.decide = nn.Linear(60, 1)

    def sample(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return for states (L, 6) which layers stay, (L,), and the logarithm of the choice's probability."""
        kept = torch.distributions.Bernoulli(logits=self.decide(self.read(states)[0]).squeeze(1))
        choice = kept.sample()
        return choice.bool(), kept.log_prob(choice).sum()


class ShrinkPolicy(nn.Module):
    """Reads layers one by one, with what it chose before, and says how much of each is left: two LSTMs of 50 units."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.LSTM(_FEATURES + 1, 50, 2)
        self.decide = nn.Linear(50, 10)

    def sample(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return for states (L, 6) shares (L,) from 0.1 to 1, and the logarithm of the choice's probability."""
        share, memory, total = torch.ones(1), None, torch.zeros(())
        shares: list[Tensor] = []
        for state in states:
            seen, memory = self.read(torch.cat((state, share))[None], memory)
            choices = torch.distributions.Categorical(logits=self.decide(seen[0]))
            choice = choices.sample()
            total = total + choices.log_prob(choice)
            share = (choice[None] + 1) / 10
            shares.append(share)
        return torch.cat(shares), total


class Reinforce:
    """Trains a policy by the rewards of what it samples, compared with their moving average.

    Args:
        policy: has `sample(states)`; its state can be saved and loaded, to go on with another teacher.
        lr: of Adam.
        rollouts: samples in an update.
        decay: of the moving average.
    """

    def __init__(self, policy: Any, *, lr: float = 3e-3, rollouts: int = 5, decay: float = 0.9) -> None:
        self.policy = policy
        self.rollouts = rollouts
        self.decay = decay
        self.baseline: float | None = None
        self._optimizer = torch.optim.Adam(policy.parameters(), lr)

    def update(self, states: Tensor, reward: Callable[[Tensor], float]) -> list[float]:
        """Take one step and return the rewards of its samples."""
        samples = [self.policy.sample(states) for _ in range(self.rollouts)]
        rewards = [reward(choice) for choice, _ in samples]
        mean = sum(rewards) / len(rewards)
        baseline = mean if self.baseline is None else self.baseline
        logs = torch.stack([log for _, log in samples])
        loss = -((torch.tensor(rewards) - baseline) * logs).mean()
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self.baseline = self.decay * baseline + (1 - self.decay) * mean
        return rewards


def layer_states(model: nn.Module, names: list[str]) -> Tensor:
    """Return what policies read of modules, (L, 6), from the first convolution or linear layer in each.

    These are whether it is a convolution, its kernel, stride and padding, the logarithm of its outputs, and how many
    such layers the module has.
    """
    rows = []
    for name in names:
        inside = list(weight_layers(model.get_submodule(name)).values())
        layer = inside[0]
        first = (0.0, 0.0, 0.0, 0.0)
        if isinstance(layer, _ConvNd):
            padding = 0 if isinstance(layer.padding, str) else layer.padding[0]
            first = (1.0, float(layer.kernel_size[0]), float(layer.stride[0]), float(padding))
        rows.append([*first, math.log2(layer.weight.shape[0]), float(len(inside))])
    # Of the order of one.
    return torch.tensor(rows).view(-1, _FEATURES) / torch.tensor([1.0, 5.0, 2.0, 2.0, 8.0, 4.0])


def removable_blocks(model: nn.Module, input_shape: tuple[int, ...]) -> list[str]:
    """Return the names of the blocks that return the shape that they read, in the order in which they run.

    Args:
        model: runs on the meta device; it stays as it is.
        input_shape: of one sample.
    """
    with torch.device("meta"):
        shadow = copy.deepcopy(model).to("meta").eval()
        x = torch.empty(1, *input_shape)
    found: dict[str, bool] = {}

    def leave(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        same = len(args) == 1 and isinstance(output, Tensor) and output.shape == args[0].shape
        found[name] = found.get(name, True) and same and bool(weight_layers(module))

    for name, module in shadow.named_modules():
        if name:
            module.register_forward_hook(
                lambda module, args, output, name=name: leave(name, module, args, output)
            )
    with torch.no_grad():
        shadow(x)
    names = [name for name, same in found.items() if same]
    # A stage gives way to its blocks, a block stays in one piece.
    stages = {
        name
        for name in names
        if isinstance(model.get_submodule(name), nn.Sequential)
        and sum(_inside(other, name) for other in names) > 1
    }
    blocks = [name for name in names if name not in stages]
    return [name for name in blocks if not any(_inside(name, other) for other in blocks)]


def _inside(name: str, other: str) -> bool:
    return name.startswith(f"{other}.")


def remove_blocks(model: M, keep: Mapping[str, bool]) -> M:
    """Return a copy of `model` in which blocks that are not kept do nothing."""
    smaller = copy.deepcopy(model)
    for name, kept in keep.items():
        if not kept:
            owner, _, leaf = name.rpartition(".")
            setattr(smaller.get_submodule(owner), leaf, nn.Identity())
    return smaller


def shrink(model: M, structure: Structure, shares: Mapping[str, float]) -> M:
    """Return a copy of `model` of whose groups only a share of the units is left, those of largest norm."""
    norms = unit_norms(model, structure)
    keep = {}
    for name, share in shares.items():
        count = max(1, round(share * len(norms[name])))
        keep[name] = torch.zeros(len(norms[name]), dtype=torch.bool)
        keep[name][norms[name].argsort(descending=True, stable=True)[:count]] = True
    return structure.remove(model, keep)


def n2n(
    model: M,
    score: Callable[[nn.Module], float],
    input_shape: tuple[int, ...],
    *,
    train: Callable[[nn.Module], Any] | None = None,
    steps: int = 20,
    rollouts: int = 5,
    policies: tuple[RemovalPolicy, ShrinkPolicy] | None = None,
    smallest: float = 0.0,
) -> tuple[M, CompressionReport]:
    """Search a smaller student of a network by two policies (`N2N <https://arxiv.org/abs/1709.06030>`_).

    The first removes blocks, the second, from the best that the first found, shrinks widths. Train the student further
    afterwards.

    Args:
        model: the teacher; it stays as it is.
        score: accuracy of a model, for example on held-out data.
        input_shape: of one sample, for example (3, 224, 224).
        train: trains a student in place for a short while, best by `distillation_loss`.
        steps: updates of each policy.
        rollouts: students in an update.
        policies: that learned on another teacher; they learn on.
        smallest: students with a smaller share of the teacher's parameters, and those that do not run, earn -1.

    Returns:
        The best student, a plain module, and the report.

    Raises:
        ValueError: if neither a block can be removed nor a width shrunk.
    """
    removal, shrinkage = policies or (RemovalPolicy(), ShrinkPolicy())
    before, teacher = sum(p.numel() for p in model.parameters()), score(copy.deepcopy(model))
    best: list[Any] = [0.0, copy.deepcopy(model)]

    def earn(make: Callable[[], nn.Module]) -> float:
        try:
            student = make()
            parameters = sum(p.numel() for p in student.parameters())
            if parameters < smallest * before:
                return -1.0
            if train is not None:
                train(student)
            reward = n2n_reward(parameters, before, score(student), teacher)
        except RuntimeError:  # shapes that do not fit
            return -1.0
        if reward > best[0]:
            best[:] = reward, student
        return reward

    blocks = removable_blocks(model, input_shape)
    search = Reinforce(removal, rollouts=rollouts)
    states = layer_states(model, blocks)
    for _ in range(steps if blocks else 0):
        search.update(
            states,
            lambda kept: earn(lambda: remove_blocks(model, dict(zip(blocks, kept.tolist(), strict=True)))),
        )
    smaller = best[1]
    structure = trace_structure(smaller, input_shape)
    names = list(structure.groups)
    if not names and not blocks:
        raise ValueError(
            "no block of this model can be removed and no width shrunk; see trace_structure(...).fixed"
        )
    search = Reinforce(shrinkage, lr=1e-2, rollouts=rollouts)
    makers = [
        next(p.name.rpartition(".")[0] for p in structure.groups[n].slices if p.dim == 0) for n in names
    ]
    states = layer_states(smaller, makers)
    for _ in range(steps if names else 0):
        search.update(
            states,
            lambda shares: earn(
                lambda: shrink(smaller, structure, dict(zip(names, shares.tolist(), strict=True)))
            ),
        )
    reward, student = best
    notes = (f"Reward of the best student: {reward:.3f}.",)
    return student, compare("N2N", model, student, input_shape=input_shape, notes=notes)
