"""Stitchable networks: trained networks of one family, joined by linear layers into many of sizes between them.

Paper: Pan et al., Stitchable Neural Networks, https://arxiv.org/abs/2302.06586. The first blocks of a cheap network (an
anchor), one 1x1 layer, the last blocks of the next dearer anchor. The official code fits the stitch before the first
block of the dearer anchor to that anchor's last features; here it is fitted to what enters the block.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from omniconv.compress.adaptive.steps import steps
from omniconv.core.seeds import generator
from omniconv.design.cost import count_cost

__all__ = [
    "Route",
    "Stitch",
    "StitchableNetwork",
    "paired_stitches",
    "train_stitches",
    "unpaired_stitches",
]


def paired_stitches(depth: int, kernel_size: int = 2, stride: int = 1) -> list[tuple[int, int, int]]:
    """Return (front, end, window) for two stacks of `depth` blocks: leave behind block front, go on with block end.

    A window slides over the block indices; all pairs within one share a stitch, in the first window that has them.
    """
    found: dict[tuple[int, int], int] = {}
    for window, start in enumerate(range(0, depth, stride)):
        inside = range(start, min(start + kernel_size, depth))
        for pair in ((front, end) for front in inside for end in inside):
            found.setdefault(pair, window)
    used = sorted(set(found.values()))
    return [(front, end, used.index(window)) for (front, end), window in found.items()]


def unpaired_stitches(front_depth: int, end_depth: int) -> list[tuple[int, int, int]]:
    """Return (front, end, front) for stacks of unequal depth, by the front block nearest to each end block.

    The end block comes later in its stack than the front block in its own, so that every stitch saves something.
    """
    nearest = [(end * front_depth // end_depth, end) for end in range(end_depth)]
    return [(front, end, front) for front, end in nearest if front < end]


class Stitch(nn.Module):
    """A linear map of the channels, between two networks.

    Args:
        in_features, out_features: channels.
        axis: of the channels.
        device, dtype: of the parameters.

    Shapes:
        - input and output: any, but for the channels
    """

    def __init__(
        self, in_features: int, out_features: int, axis: int = 1, *, device=None, dtype=None
    ) -> None:
        super().__init__()
        self.axis = axis
        self.fc = nn.Linear(in_features, out_features, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map the channels of `x`."""
        return self.fc(x.movedim(self.axis, -1)).movedim(-1, self.axis)

    @torch.no_grad()
    def fit(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        r"""Set the weights by least squares, :math:`M = X^+ Y`; of several pairs, to the mean of the solutions.

        Args:
            pairs: features X before the stitch and Y wanted behind it, equal but for the channels.
        """
        solutions = []
        for x, y in pairs:
            x, y = (t.movedim(self.axis, -1).flatten(0, -2).double() for t in (x, y))
            x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
            # Normal equations need no more memory than the weights; dead channels make them singular.
            solutions.append(torch.linalg.pinv(x.T @ x, hermitian=True) @ (x.T @ y))
        solution = torch.stack(solutions).mean(0)
        self.fc.weight.copy_(solution[:-1].T)
        self.fc.bias.copy_(solution[-1])


@dataclass(frozen=True)
class Route:
    """One way through the anchors.

    Attributes:
        front: the anchor in which it begins.
        leave: number of the step of `front` that runs last; None for the whole anchor.
        enter: number of the step of the next anchor that runs first behind the stitch.
        stitch: number of the stitch.
    """

    front: int
    leave: int | None = None
    enter: int = 0
    stitch: int = 0


class StitchableNetwork(nn.Module):
    r"""Anchors and all stitches between neighbours, of `SN-Net <https://arxiv.org/abs/2302.06586>`_.

    .. math:: y = B_{d} \circ \dots \circ B_{j} \circ M \circ A_{i} \circ \dots \circ A_{1} (x)

    for block i of anchor A, block j of the next dearer anchor B and a linear map M of the channels. `routes` are the
    anchors, from cheap to dear, and then the stitched networks; `set_stitch` chooses the one that runs.

    Anchors of one stage with equal depths (vision transformers) are stitched within a sliding window. Others are
    stitched stage by stage, only forward, since the first block of a stage may change the shape.

    Args:
        anchors: trained networks of one family whose `steps` are known, from cheap to dear; they are copied.
        images: about a hundred inputs (N, C, H, W), to which the stitches are fitted by least squares.
        kernel_size, stride: of the sliding window, in blocks.

    Shapes:
        - input: as of the anchors
        - output: :math:`(N, K)`

    Raises:
        ValueError: if there are fewer than two anchors, they do not come from cheap to dear, or their stages or
            feature maps do not fit each other.
    """

    def __init__(
        self, anchors: Sequence[nn.Module], images: Tensor, *, kernel_size: int = 2, stride: int = 1
    ) -> None:
        super().__init__()
        if len(anchors) < 2:
            raise ValueError(f"anchors must be at least two networks: got {len(anchors)}")
        macs = [count_cost(anchor, tuple(images.shape[1:])).macs for anchor in anchors]
        if macs != sorted(macs):
            raise ValueError(f"anchors must go from cheap to dear: got {macs} multiply-adds")
        self.anchors = nn.ModuleList(copy.deepcopy(list(anchors)))
        self.stitches = nn.ModuleList()
        self.routes = [Route(front) for front in range(len(anchors))]
        features = [_features(anchor, images) for anchor in self.anchors]
        for front in range(len(anchors) - 1):
            self._stitch(front, features[front], features[front + 1], kernel_size, stride)
        self.current = 0

    def _stitch(
        self, front: int, first: list[Tensor], second: list[Tensor], kernel_size: int, stride: int
    ) -> None:
        """Add and fit the stitches from one anchor to the next, given what every step of both puts out."""
        cheap, dear = (_blocks(self.anchors[index]) for index in (front, front + 1))
        if len(cheap) != len(dear):
            raise ValueError(
                f"anchors must have the same stages: got {len(cheap)} and {len(dear)}; name others"
            )
        for a, b in zip(cheap, dear, strict=True):
            if len(a) == len(b):
                pairs = paired_stitches(len(a), kernel_size, stride)
                if len(cheap) > 1:
                    pairs = [pair for pair in pairs if pair[0] < pair[1]]
            else:
                pairs = unpaired_stitches(len(a), len(b))
            for window in sorted({window for *_, window in pairs}):
                ends = [(a[i], b[j]) for i, j, w in pairs if w == window]
                axis = steps(self.anchors[front])[ends[0][0]].axis
                # What enters a block is what the step before it puts out.
                fits = [(first[leave], second[enter - 1]) for leave, enter in ends]
                for x, y in fits:
                    if x.movedim(axis, -1).shape[:-1] != y.movedim(axis, -1).shape[:-1]:
                        raise ValueError(
                            f"feature maps of the anchors must have the same size: got {tuple(x.shape)} and "
                            f"{tuple(y.shape)}"
                        )
                x, y = fits[0]
                stitch = Stitch(x.shape[axis], y.shape[axis], axis, device=x.device, dtype=x.dtype)
                stitch.fit(fits)
                number = len(self.stitches)
                self.routes += [Route(front, leave, enter, number) for leave, enter in ends]
                self.stitches.append(stitch)
        if self.routes[-1].front != front or self.routes[-1].leave is None:
            raise ValueError(
                f"no block of anchor {front} can be left for anchor {front + 1}: take other depths"
            )

    def set_stitch(self, index: int) -> None:
        """Choose the route that runs from now on; the first are the anchors."""
        if not 0 <= index < len(self.routes):
            raise ValueError(f"index must lie in [0, {len(self.routes)}): got {index}")
        self.current = index

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of the current route."""
        route = self.routes[self.current]
        if route.leave is None:
            return self.anchors[route.front](x)
        for step in steps(self.anchors[route.front])[: route.leave + 1]:
            x = step.run(x)
        x = self.stitches[route.stitch](x)
        for step in steps(self.anchors[route.front + 1])[route.enter :]:
            x = step.run(x)
        return x

    def costs(self, input_shape: Sequence[int]) -> list[tuple[int, int]]:
        """Return (multiply-adds of one sample of `input_shape`, index) of every route, cheapest first."""
        with torch.device("meta"):
            shadow = copy.deepcopy(self).to("meta").eval()
            x = torch.empty(1, *input_shape)
        costs = []
        for index in range(len(self.routes)):
            shadow.set_stitch(index)
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                shadow(x)
            costs.append((counter.get_total_flops() // 2, index))
        return sorted(costs)

    def extract(self, index: int) -> "StitchableNetwork":
        """Return a copy whose only route is this one, without the blocks and stitches that it does not need."""
        network = copy.deepcopy(self)
        route = self.routes[index]
        network.routes, network.current = [route], 0
        keep = {route.front: slice(0, None)}
        if route.leave is not None:
            keep = {route.front: slice(0, route.leave + 1), route.front + 1: slice(route.enter, None)}
        for number, anchor in enumerate(network.anchors):
            if number not in keep:
                network.anchors[number] = nn.Identity()
                continue
            chain = steps(anchor)
            for step in set(chain) - set(chain[keep[number]]):
                if step.stage is not None:
                    anchor.set_submodule(step.name, nn.Identity())
        for number in range(len(network.stitches)):
            if route.leave is None or number != route.stitch:
                network.stitches[number] = nn.Identity()
        return network


@torch.no_grad()
def _features(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Return what every step of a network puts out in eval mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    outputs, x = [], images
    for step in steps(model):
        x = step.run(x)
        outputs.append(x)
    for module, training in modes.items():
        module.training = training
    return outputs


def _blocks(model: nn.Module) -> list[list[int]]:
    """Return the numbers of the steps that are blocks, stage by stage."""
    chain = steps(model)
    stages = sorted({step.stage for step in chain if step.stage is not None})
    return [[index for index, step in enumerate(chain) if step.stage == stage] for stage in stages]


def train_stitches(
    network: StitchableNetwork,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    teacher: nn.Module | None = None,
    seed: int = 0,
) -> None:
    """Train anchors and stitches together, one route drawn at random a batch, in place.

    Args:
        network: stays in its mode and on its route.
        batches: inputs and targets; one step each.
        optimizer: of the network's parameters.
        loss: of logits and targets.
        teacher: a network in eval mode whose answers count for one half, as if they were the targets.
        seed: of the routes.
    """
    random = generator(seed, "stitches")
    current = network.current
    for x, y in batches:
        network.set_stitch(int(torch.randint(len(network.routes), (), generator=random)))
        logits = network(x)
        value = loss(logits, y)
        if teacher is not None:
            with torch.no_grad():
                answers = teacher(x).argmax(1)
            value = (value + F.cross_entropy(logits, answers)) / 2
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
    network.set_stitch(current)
