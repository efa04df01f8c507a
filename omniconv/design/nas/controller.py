"""The controller that found NASNet: a recurrent network that writes cells and is rewarded for good ones.

Paper: Zoph et al., Learning Transferable Architectures for Scalable Image Recognition,
https://arxiv.org/abs/1707.07012, section 3 and appendix A. An LSTM writes 5 choices for each of B blocks, first of the
normal and then of the reduction cell: two earlier states, an operation for each, and how to join them. Proximal
policy optimization (Schulman et al., https://arxiv.org/abs/1707.06347) raises the probability of what was rewarded
above an average.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.models.image.nasnet import OPERATIONS, Block, CellSpec, Genotype

__all__ = ["Controller", "ControllerTrainer", "decode", "random_choices"]

JOINS = ("add", "concat")


def choice_sizes(blocks: int) -> list[int]:
    """Return how many values each of the 2 x 5 x `blocks` choices can take."""
    cell = [
        size
        for block in range(blocks)
        for size in (2 + block, 2 + block, len(OPERATIONS), len(OPERATIONS), 2)
    ]
    return cell * 2


def random_choices(count: int, blocks: int = 5, generator: torch.Generator | None = None) -> Tensor:
    """Return `count` uniformly drawn rows of choices, (count, 10 blocks): random search."""
    columns = [torch.randint(size, (count,), generator=generator) for size in choice_sizes(blocks)]
    return torch.stack(columns, 1)


def decode(choices: Tensor) -> Genotype:
    """Return the genotype that a row of choices stands for; states that no block reads are put out."""
    cells = []
    for half in choices.view(2, -1, 5).tolist():
        blocks = (
            Block(OPERATIONS[left_op], left, OPERATIONS[right_op], right, JOINS[join])
            for left, right, left_op, right_op, join in half
        )
        cells.append(CellSpec(tuple(blocks)))
    return Genotype(*cells)


class Controller(nn.Module):
    """One-layer LSTM with a softmax for every choice, fed with the choice before.

    Args:
        blocks: B, blocks of a cell.
        hidden: units of the LSTM.
    """

    allowed: Tensor

    def __init__(self, blocks: int = 5, hidden: int = 100) -> None:
        super().__init__()
        sizes = torch.tensor(choice_sizes(blocks))
        self.widest = int(sizes.max())
        # Which values each choice may take.
        self.register_buffer("allowed", torch.arange(self.widest) < sizes[:, None], persistent=False)
        # A choice is told from an equal number that another kind of choice gave; row 0 begins the sequence.
        self.embedding = nn.Embedding(1 + 5 * self.widest, hidden)
        self.lstm = nn.LSTM(hidden, hidden, batch_first=True)
        self.heads = nn.ModuleList(nn.Linear(hidden, self.widest) for _ in range(5))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights uniformly from -0.1 to 0.1, as the paper does."""
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.1, 0.1)

    @torch.no_grad()
    def sample(self, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return `count` rows of choices, (count, 10 B), and the logarithms of their probabilities."""
        token = torch.zeros(count, 1, dtype=torch.long, device=self.allowed.device)
        state, choices, logs = None, [], []
        for index, allowed in enumerate(self.allowed):
            kind = index % 5
            hidden, state = self.lstm(self.embedding(token), state)
            log_p = self.heads[kind](hidden[:, 0]).masked_fill(~allowed, -torch.inf).log_softmax(1)
            choice = torch.multinomial(log_p.exp(), 1, generator=generator)
            choices.append(choice)
            logs.append(log_p.gather(1, choice))
            token = 1 + kind * self.widest + choice
        return torch.cat(choices, 1), torch.cat(logs, 1)

    def forward(self, choices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logarithm of every choice's probability and the entropy of what it was drawn from."""
        kinds = torch.arange(choices.shape[1], device=choices.device) % 5
        tokens = (1 + kinds * self.widest + choices)[:, :-1]
        hidden, _ = self.lstm(self.embedding(F.pad(tokens, (1, 0))))
        logits = torch.stack([head(hidden[:, kind::5]) for kind, head in enumerate(self.heads)], 2)
        log_p = logits.flatten(1, 2).masked_fill(~self.allowed, -torch.inf).log_softmax(2)
        entropies = -(log_p.exp() * log_p.masked_fill(~self.allowed, 0)).sum(2)
        return log_p.gather(2, choices[:, :, None])[:, :, 0], entropies


class ControllerTrainer:
    r"""Proximal policy optimization of a controller.

    .. math:: L = -\mathbb{E} \min\bigl(r A,\ \mathrm{clip}(r, 1 - \epsilon, 1 + \epsilon) A\bigr) - \beta H, \qquad
              r = p / p_\mathrm{old}

    with the advantage A, the reward less its moving average. A step's ratio is taken choice by choice.

    Args:
        controller: what to train.
        reward: the quality of rows of choices, (N,); in a search, what the cells reach after a training.
        batch: rows a step.
        lr: of Adam; the paper's search of thousands of steps takes 0.00035.
        epochs: gradient steps on every batch.
        clip: :math:`\epsilon`.
        entropy: :math:`\beta`.
        decay: of the moving average.
    """

    def __init__(
        self,
        controller: Controller,
        reward: Callable[[Tensor], Tensor],
        *,
        batch: int = 20,
        lr: float = 3.5e-4,
        epochs: int = 4,
        clip: float = 0.2,
        entropy: float = 1e-5,
        decay: float = 0.95,
    ) -> None:
        self.controller, self.reward, self.batch, self.epochs = controller, reward, batch, epochs
        self.clip, self.entropy, self.decay = clip, entropy, decay
        self.optimizer = torch.optim.Adam(controller.parameters(), lr)
        self.average: float | None = None

    def step(self, generator: torch.Generator | None = None) -> float:
        """Draw a batch, learn from its rewards, and return their mean."""
        choices, old = self.controller.sample(self.batch, generator)
        rewards = self.reward(choices).to(old)
        mean = rewards.mean().item()
        self.average = mean if self.average is None else self.decay * self.average + (1 - self.decay) * mean
        advantage = (rewards - self.average)[:, None]
        for _ in range(self.epochs):
            logs, entropies = self.controller(choices)
            ratio = (logs - old).exp()
            clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
            gain = torch.minimum(ratio * advantage, clipped * advantage).mean()
            self.optimizer.zero_grad(set_to_none=True)
            (-gain - self.entropy * entropies.mean()).backward()
            self.optimizer.step()
        return mean
