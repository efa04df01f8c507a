"""MST compression: an output of a binary convolution follows from another by the weights in which they differ.

Paper: Vo et al., MST-compression: Compressing and Accelerating Binary Neural Networks with Minimum Spanning Tree,
https://arxiv.org/abs/2308.13735.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.compress.binary.conv import BinaryConv2d, sign
from omniconv.compress.quantize.bits import pack_bits, unpack_bits
from omniconv.compress.report import CompressionReport, compare

__all__ = [
    "MSTConv2d", "MSTLoss", "SpanningTree", "hamming_distances", "minimum_spanning_tree", "mst_compress",
]  # fmt: skip

M = TypeVar("M", bound=nn.Module)


def hamming_distances(signs: Tensor) -> Tensor:
    """Return in how many places every two rows of `signs` (C, n), of 1 and -1, differ: (C, C), int64."""
    # Sums of ones are exact in double precision.
    signs = signs.double()
    return ((signs.shape[1] - signs @ signs.T) / 2).long()


@dataclass(frozen=True)
class SpanningTree:
    """A rooted tree over the output channels of a layer.

    Attributes:
        parents: of every channel; the root is its own.
        levels: channels by their distance from the root in edges, the root's first.
        distance: sum of the lengths of all edges.
    """

    parents: tuple[int, ...]
    levels: tuple[tuple[int, ...], ...]
    distance: int

    @property
    def root(self) -> int:
        """The channel that is computed in full."""
        return self.levels[0][0]

    @property
    def depth(self) -> int:
        """Edges between the root and the farthest channel."""
        return len(self.levels) - 1

    def operations(self, taps: int) -> int:
        """Return the bit operations for a pixel of all outputs whose kernels have `taps` weights."""
        return taps + self.distance


def minimum_spanning_tree(distances: Tensor) -> SpanningTree:
    """Return a minimum spanning tree of the complete graph, rooted where it is least deep.

    Prim's algorithm; of equal edges that one is taken which leads to the less deep channel.

    Args:
        distances: (C, C), whole numbers, symmetric.
    """
    lengths = distances.cpu()
    count = len(lengths)
    start = int(lengths.sum(1).argmin())
    best, parents = lengths[start].clone(), torch.full((count,), start)
    depth, outside = torch.zeros(count, dtype=torch.long), torch.ones(count, dtype=torch.bool)
    outside[start] = False
    neighbours: list[list[int]] = [[] for _ in range(count)]
    total = 0
    for _ in range(count - 1):
        nearest = int(
            torch.where(outside, best * count + depth[parents], torch.iinfo(torch.long).max).argmin()
        )
        parent = int(parents[nearest])
        total += int(best[nearest])
        outside[nearest] = False
        depth[nearest] = depth[parent] + 1
        neighbours[parent].append(nearest)
        neighbours[nearest].append(parent)
        closer = lengths[nearest] * count + depth[nearest] < best * count + depth[parents]
        best, parents = torch.where(closer, lengths[nearest], best), torch.where(closer, nearest, parents)
    return _rooted(neighbours, _center(neighbours), total)


def _center(neighbours: list[list[int]]) -> int:
    """Return a middle of the longest path, found by taking leaves off until one or two vertices are left."""
    degree = [len(near) for near in neighbours]
    leaves, left = [v for v, d in enumerate(degree) if d <= 1], len(degree)
    while left > 2:
        left -= len(leaves)
        touched = [n for leaf in leaves for n in neighbours[leaf] if degree[n] > 0]
        for leaf in leaves:
            degree[leaf] = 0
        for n in touched:
            degree[n] -= 1
        leaves = [n for n in dict.fromkeys(touched) if degree[n] == 1 or (degree[n] == 0 and left == 1)]
    return leaves[0]


def _rooted(neighbours: list[list[int]], root: int, distance: int) -> SpanningTree:
    parents = [root] * len(neighbours)
    levels, level = [], [root]
    while level:
        levels.append(tuple(level))
        below = [(n, v) for v in level for n in neighbours[v] if n != parents[v]]
        for n, v in below:
            parents[n] = v
        level = [n for n, _ in below]
    return SpanningTree(tuple(parents), tuple(levels), distance)


def _tree(conv: BinaryConv2d) -> SpanningTree:
    return minimum_spanning_tree(hamming_distances(sign(conv.weight.detach()).flatten(1)))


class MSTConv2d(nn.Module):
    r"""A trained `BinaryConv2d` along its tree, `MST compression <https://arxiv.org/abs/2308.13735>`_.

    .. math:: y_j = y_i + 2 \sum_{p:\, w_{jp} \ne w_{ip}} w_{jp}\, x_p

    for a channel j and its parent i in the tree; the root is computed in full. The state holds a bit for every weight.

    Args:
        conv: the trained layer, without groups.

    Shapes:
        - as of `conv`

    Raises:
        ValueError: if `conv` has groups, whose outputs share no inputs.
    """

    bits: Tensor
    parents: Tensor
    bias: Tensor | None

    def __init__(self, conv: BinaryConv2d) -> None:
        super().__init__()
        if conv.groups != 1:
            raise ValueError(f"conv must have no groups: got {conv.groups}")
        self.shape, self.binary_input = tuple(conv.weight.shape), conv.binary_input
        self.settings = conv.stride, conv.padding, conv.dilation
        self.padding_mode, self._sides = conv.padding_mode, conv._reversed_padding_repeated_twice
        self.tree = _tree(conv)
        self.register_buffer("bits", pack_bits(conv.weight.detach() >= 0, 1))
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach().clone())

    @property
    def stored_bits(self) -> int:
        """Bits of a code of the tree: the root, and of every other channel its parent and which weights differ.

        A choice of d among n weights is coded as its number among all of them, after d itself.
        """
        channels, taps = self.shape[0], math.prod(self.shape[1:])
        signs = self._signs().flatten(1)
        apart = (signs != signs[torch.tensor(self.tree.parents)]).sum(1).tolist()
        choices = [math.comb(taps, d) for v, d in enumerate(apart) if v != self.tree.root]
        edge = (channels - 1).bit_length() + taps.bit_length()
        return taps + sum(edge + (count - 1).bit_length() for count in choices)

    def _signs(self) -> Tensor:
        return 2 * unpack_bits(self.bits, 1, self.shape) - 1

    def forward(self, x: Tensor) -> Tensor:
        """Convolve the root and the differences, and add them up along the tree."""
        x = sign(x) if self.binary_input else x
        parents = torch.tensor(self.tree.parents, device=x.device)
        signs = self._signs()
        # 1 or -1 where a channel differs from its parent; the root, its own parent, keeps all weights.
        steps = (signs - signs[parents]).div(2, rounding_mode="trunc")
        steps[self.tree.root] = signs[self.tree.root]
        stride, padding, dilation = self.settings
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._sides, mode=self.padding_mode), 0
        y = F.conv2d(x, steps.to(x.dtype), None, stride, padding, dilation)
        for level in self.tree.levels[1:]:
            here = torch.tensor(level, device=x.device)
            y[:, here] = y[:, parents[here]] + 2 * y[:, here]
        return y if self.bias is None else y + self.bias[:, None, None]


class MSTLoss(nn.Module):
    r"""What pulls channels together while a binary network trains, `MST compression <https://arxiv.org/abs/2308.13735>`_.

    .. math:: \frac{\sum_l \sum_{j} d(w_j, w_{i(j)})}{\sum_l C_l n_l}

    over layers l and their channels j with parents i(j): the share of weights that differ along the trees. Its gradient
    reaches the latent weights of j straight through their signs; the parent's are held.

    Args:
        model: its `BinaryConv2d` layers without groups are taken.
        every: calls after which the trees are made anew.

    Raises:
        ValueError: if the model has no such layer.
    """

    def __init__(self, model: nn.Module, every: int = 10) -> None:
        super().__init__()
        self._layers = [m for m in model.modules() if isinstance(m, BinaryConv2d) and m.groups == 1]
        if not self._layers:
            raise ValueError("model must have a BinaryConv2d without groups; see binarize")
        self.every = every
        self._calls, self._parents = 0, [torch.empty(0)] * len(self._layers)

    def forward(self) -> Tensor:
        """Return the share for the weights as they are."""
        if self._calls % self.every == 0:
            self._parents = [torch.tensor(_tree(m).parents, device=m.weight.device) for m in self._layers]
        self._calls += 1
        apart = self._layers[0].weight.new_zeros(())
        for layer, parents in zip(self._layers, self._parents, strict=True):
            signs = sign(layer.weight)
            apart = apart + (1 - signs * signs.detach()[parents]).sum() / 2
        return apart / sum(layer.weight.numel() for layer in self._layers)


def mst_compress(model: M) -> tuple[M, CompressionReport]:
    """Replace the trained `BinaryConv2d` layers of a model by `MSTConv2d`, which compute the same.

    Args:
        model: any module; it stays as it is.

    Returns:
        The copy, and the report, whose notes give the bit operations of every layer.
    """
    result: Any = copy.deepcopy(model)
    notes = []
    for name, conv in list(result.named_modules()):
        if not isinstance(conv, BinaryConv2d):
            continue
        if conv.groups != 1:
            notes.append(f"{name} has groups, whose outputs share no inputs; it stays as it is.")
            continue
        new = MSTConv2d(conv).train(conv.training)
        taps, total = math.prod(new.shape[1:]), math.prod(new.shape)
        operations = new.tree.operations(taps)
        notes.append(
            f"{name}: {operations:,} of {total:,} bit operations a pixel ({total / operations:.2f}x), depth "
            f"{new.tree.depth}; {new.stored_bits:,} bits as a tree."
        )
        if name:
            result.set_submodule(name, new)
        else:
            result = new
    if not notes:
        notes.append("The model has no BinaryConv2d; nothing was changed.")
    else:
        notes.append(
            "Files hold one bit a weight; torch has no operations on bits, so that here it is not faster."
        )
    return result, compare("MST compression", model, result, notes=tuple(notes))
