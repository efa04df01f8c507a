"""Labels of what stands where in a tensor in flight, and what has been learned of units that go together."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["FIXED", "Ties", "compact", "thin", "varying"]

FIXED = 1
"""The label of what cannot be removed: images, answers, and whatever meets an operation without a rule."""


def varying(labels: Tensor) -> list[int]:
    """Return the dimensions along which labels are not constant."""
    return [
        d
        for d in range(labels.ndim)
        if labels.size(d) > 1 and labels.stride(d) and bool((labels != labels.narrow(d, 0, 1)).any())
    ]


def thin(labels: Tensor, dims: Iterable[int]) -> Tensor:
    """Return the first line of labels along each of `dims`, which keep size 1."""
    for d in dims:
        labels = labels.narrow(d, 0, 1)
    return labels


def compact(labels: Tensor) -> Tensor:
    """Return the same labels, stored once along dimensions in which they do not vary."""
    constant = set(range(labels.ndim)) - set(varying(labels))
    return thin(labels, constant).expand(labels.shape) if labels.numel() else labels


@dataclass
class Ties:
    """What was learned: pairs of units that go together, and which elements of parameters belong to which unit.

    Attributes:
        units: labels given so far.
        pairs: tensors (2, n) of labels that are removed together.
        uses: pairs (elements of parameters, labels), element for element.
        shared: pairs of labels, element for element: the first, which was stretched, goes when all that it met go.
        follows: triples of elements of parameters: the first ones go when the second and third, which stand for a
            whole row, go.
    """

    units: int = FIXED
    pairs: list[Tensor] = field(default_factory=list)
    uses: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    shared: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    follows: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def fresh(self, count: int) -> Tensor:
        """Return `count` new labels."""
        self.units += count
        return torch.arange(self.units - count + 1, self.units + 1)

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Let the units of `a` and `b` go together, element for element, and parameters with the unit they meet."""
        a, b = torch.broadcast_tensors(a, b)
        both = (a > 0) & (b > 0) & (a != b)
        if both.any():
            # As one number, pairs sort much faster than as columns.
            pairs = (a[both] << 32 | b[both]).unique()
            self.pairs.append(torch.stack((pairs >> 32, pairs & 0xFFFFFFFF)))
        for codes, labels in ((a, b), (b, a)):
            met = (codes < 0) & (labels > 0)
            if met.any():
                self.uses.append((codes[met], labels[met]))

    def fix(self, labels: Tensor) -> None:
        """Keep the units and parameters of `labels` from being removed."""
        self.tie(labels[labels != 0], torch.tensor(FIXED))
