"""The search that found EvoNorm: layers as small graphs of tensor operations, evolved, with early rejection.

Paper: Liu et al., Evolving Normalization-Activation Layers, https://arxiv.org/abs/2004.02967. A layer is a graph of
four leaves (the input, zero, and two vectors over the channels that start at 0 and 1) and ten operations, the last of
which gets a scale and a shift. Most graphs are worthless; a hundred steps of training and an ascent of the gradient's
norm tell those apart from the rest at a small part of a training's cost.
"""

import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = [
    "OPERATIONS",
    "Candidate",
    "GraphNorm",
    "Layer",
    "Node",
    "evolve",
    "gradient_ascent",
    "mutate",
    "pareto",
    "random_layer",
]

EPS = 1e-5
LEAVES = 4
NODES = 14
AXES: Mapping[str, tuple[int, ...]] = {"bwh": (0, 2, 3), "wh": (2, 3), "whc": (1, 2, 3), "whg": (2, 3)}
"""What a moment is taken over: whg stands for the pixels and the channels of one group."""


def _signed(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: x.sign() * function(x.abs() + EPS)


def _moment(kind: str, x: Tensor, axes: tuple[int, ...]) -> Tensor:
    mean = x.mean(axes, keepdim=True)
    if kind == "mean":
        return mean
    square = x.square().mean(axes, keepdim=True)
    if kind == "deviation":
        square = (x - mean).square().mean(axes, keepdim=True)
    return (square + EPS).sqrt()


UNARY: Mapping[str, Callable[[Tensor], Tensor]] = {
    "neg": torch.neg, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "exp": torch.exp, "abs": torch.abs,
    "square": torch.square, "log": _signed(torch.log), "sqrt": _signed(torch.sqrt),
}  # fmt: skip
BINARY: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add, "mul": torch.mul, "div": lambda x, y: x / (y + EPS), "max": torch.maximum,
}  # fmt: skip
MOMENTS = tuple(f"{kind}_{axes}" for kind in ("mean", "rms", "deviation") for axes in AXES)
OPERATIONS: tuple[str, ...] = (*UNARY, *BINARY, *MOMENTS)
"""Names of what a node may compute; logarithm and root keep their argument's sign."""


class Node(NamedTuple):
    """An operation and the earlier nodes that it reads, of which unary ones and moments read the first alone."""

    operation: str
    inputs: tuple[int, int]

    @property
    def reads(self) -> tuple[int, ...]:
        """The nodes that the result depends on."""
        return self.inputs if self.operation in BINARY else self.inputs[:1]


Layer = tuple[Node, ...]
"""The operations of a layer; node i reads leaves (0 input, 1 zero, 2 and 3 vectors) and operations before it."""


def random_layer(random: random.Random) -> Layer:
    """Return a graph whose operations and edges are drawn uniformly."""
    return tuple(_random_node(random, index) for index in range(LEAVES, NODES))


def _random_node(random: random.Random, index: int) -> Node:
    return Node(random.choice(OPERATIONS), (random.randrange(index), random.randrange(index)))


def mutate(layer: Layer, random: random.Random) -> Layer:
    """Return the graph with a new operation and new inputs for one node."""
    index = random.randrange(len(layer))
    return (*layer[:index], _random_node(random, LEAVES + index), *layer[index + 1 :])


class GraphNorm(nn.Module):
    r"""The module that a graph stands for, :math:`y = \gamma\, g(x) + \beta`.

    Moments over the batch have moving averages in eval mode.

    Args:
        layer: the graph.
        channels: of the input.
        groups: of the moments over groups.
        momentum: weight of a new batch in the moving averages.

    Shapes:
        - input and output: :math:`(N, C, H, W)`
    """

    def __init__(self, layer: Layer, channels: int, groups: int = 8, momentum: float = 0.1) -> None:
        super().__init__()
        self.layer, self.groups, self.momentum = layer, groups, momentum
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.v0 = nn.Parameter(torch.zeros(channels))
        self.v1 = nn.Parameter(torch.ones(channels))
        self.used = _ancestors(layer)
        for index in self.used:
            if index >= LEAVES and layer[index - LEAVES].operation.endswith("_bwh"):
                self.register_buffer(f"average{index}", torch.full((1, channels, 1, 1), float("nan")))

    @property
    def reads_input(self) -> bool:
        """Whether the output depends on the input."""
        return 0 in self.used

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the graph on `x`."""
        vectors = (v[:, None, None] for v in (self.v0, self.v1))
        values: dict[int, Tensor] = dict(enumerate((x, x.new_zeros(()), *vectors)))
        for index in self.used:
            if index >= LEAVES:
                node = self.layer[index - LEAVES]
                values[index] = self._evaluate(index, node.operation, *(values[i] for i in node.reads))
        y = values[LEAVES + len(self.layer) - 1]
        return (y * self.weight[:, None, None] + self.bias[:, None, None]).expand_as(x)

    def _evaluate(self, index: int, operation: str, *inputs: Tensor) -> Tensor:
        if operation in BINARY:
            return BINARY[operation](*inputs)
        (a,) = inputs
        if operation in UNARY:
            return UNARY[operation](a)
        kind, axes = operation.split("_")
        # Moments are of whole maps, also where their argument is the same for all pixels or samples.
        shape = (1, len(self.weight), 1, 1)
        a = a.expand(torch.broadcast_shapes(a.shape, shape))
        if axes == "whg":
            grouped = a.unflatten(1, (self.groups, -1)).flatten(2, 3)
            return _moment(kind, grouped, (2, 3)).repeat_interleave(len(self.weight) // self.groups, 1)
        value = _moment(kind, a, AXES[axes])
        return self._averaged(index, value) if axes == "bwh" else value

    def _averaged(self, index: int, value: Tensor) -> Tensor:
        average = self.get_buffer(f"average{index}")
        if not self.training:
            return average
        with torch.no_grad():
            average.copy_(torch.where(average.isnan(), value, average.lerp(value, self.momentum)))
        return value


def _ancestors(layer: Layer) -> list[int]:
    """Return the nodes that the last one depends on, and itself, in order."""
    found, open_nodes = set(), [LEAVES + len(layer) - 1]
    while open_nodes:
        index = open_nodes.pop()
        if index not in found:
            found.add(index)
            if index >= LEAVES:
                open_nodes += layer[index - LEAVES].reads
    return sorted(found)


def gradient_ascent(
    model: nn.Module,
    loss: Callable[[nn.Module], Tensor],
    *,
    steps: int = 100,
    lr: float = 0.1,
    limit: float = 1e8,
) -> float:
    r"""Return the largest norm of the gradient that moving the weights towards larger ones reaches.

    The paper rejects a layer as unstable where :math:`\max_\theta \lVert \partial \ell / \partial \theta \rVert_2`
    exceeds :math:`10^8` within 100 steps of ascent. The network's weights are changed.

    Args:
        model: a network with the layer.
        loss: function of the network.
        steps: of ascent, each along the normalised direction.
        lr: length of a step.
        limit: stop above.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    largest = 0.0
    for _ in range(steps):
        gradients = torch.autograd.grad(loss(model), parameters, create_graph=True, materialize_grads=True)
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        largest = max(largest, norm.item()) if norm.isfinite() else float("inf")
        if largest > limit or not norm.requires_grad:
            break
        directions = torch.autograd.grad(norm, parameters, materialize_grads=True)
        length = torch.stack([d.square().sum() for d in directions]).sum().sqrt()
        if not length.isfinite():
            return float("inf")
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(direction / (length + EPS), alpha=lr)
    return largest


def pareto(scores: Sequence[Sequence[float]]) -> list[int]:
    """Return the indices of the points that no other point is at least as good as everywhere and better somewhere."""

    def beaten(one: Sequence[float]) -> bool:
        return any(
            all(a >= b for a, b in zip(other, one, strict=True)) and tuple(other) != tuple(one)
            for other in scores
        )

    return [index for index, one in enumerate(scores) if not beaten(one)]


@dataclass(frozen=True)
class Candidate:
    """A layer and its accuracy in each of the networks that it was tried in."""

    layer: Layer
    scores: tuple[float, ...]


def evolve(
    evaluate: Callable[[Layer], tuple[float, ...] | None],
    random: random.Random,
    *,
    trials: int,
    population: int = 20,
    tournament: float = 0.25,
    first: int | None = None,
) -> list[Candidate]:
    """Return all layers that were kept, in the order of their trials.

    A trial draws a tournament from the living, takes a random layer of its Pareto front, mutates it and evaluates the
    child; the oldest of a full population dies. The paper keeps 2500 layers and draws 5% of them.

    Args:
        evaluate: gives the accuracies of a layer in several networks, or None if it is rejected.
        random: the source of all choices.
        trials: layers that are evaluated, rejected ones included.
        population: how many layers live at most.
        tournament: share of the living that compete.
        first: random layers at the start; `population` by default. All trials are random ones until a layer is kept.
    """
    kept: list[Candidate] = []
    living: deque[Candidate] = deque(maxlen=population)
    for trial in range(trials):
        if trial < (population if first is None else first) or not living:
            layer = random_layer(random)
        else:
            rivals = random.sample(list(living), max(1, round(tournament * len(living))))
            front = pareto([rival.scores for rival in rivals])
            layer = mutate(rivals[random.choice(front)].layer, random)
        scores = evaluate(layer)
        if scores is not None:
            living.append(Candidate(layer, scores))
            kept.append(living[-1])
    return kept
