"""Containers for branches that need more or fewer frames: their outputs are aligned, in clips and in streams.

Paper: Hedegaard, Efficient Online Processing with Deep Neural Networks, https://arxiv.org/abs/2306.13474.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, fx, nn

__all__ = ["Parallel", "Residual", "join"]

_REDUCE = ("sum", "concat")


@fx.wrap
def join(branches: Sequence[Tensor], reduce: str = "sum") -> Tensor:
    """Return the sum or the channels side by side of clips (N, C, T, ...), all cropped to the middle of the shortest.

    Args:
        branches: clips that differ in length by even numbers of frames, as convolutions without padding leave them.
        reduce: "sum" or "concat".

    Raises:
        ValueError: if one cannot be cropped alike on both sides.
    """
    shortest = min(branch.shape[2] for branch in branches)
    for branch in branches:
        if (branch.shape[2] - shortest) % 2:
            raise ValueError(
                "branches must differ by an even number of frames to be aligned: "
                f"got {[b.shape[2] for b in branches]}"
            )
    cropped = [b.narrow(2, (b.shape[2] - shortest) // 2, shortest) for b in branches]
    return torch.stack(cropped).sum(0) if reduce == "sum" else torch.cat(cropped, 1)


class Parallel(nn.Module):
    r"""Branches over the same frames, added or side by side (`paper <https://arxiv.org/abs/2306.13474>`_).

    .. math:: y_t = \sum_i f_i(x)_{t - (T_i - \min_j T_j) / 2}

    with the lengths :math:`T_i` of the branches: longer ones are cropped to the middle, so that every branch's
    output meets those whose receptive fields have the same centre. `continual` keeps the earlier of them waiting.

    Args:
        branches: modules on clips.
        reduce: "sum" or "concat", along channels.

    Shapes:
        - input: :math:`(N, C, T, ...)`
        - output: :math:`(N, C', T', ...)`

    Raises:
        ValueError: if `reduce` is neither of them.
    """

    def __init__(self, *branches: nn.Module, reduce: Literal["sum", "concat"] = "sum") -> None:
        super().__init__()
        if reduce not in _REDUCE:
            raise ValueError(f"reduce must be sum or concat: got {reduce!r}")
        self.branches = nn.ModuleList(branches)
        self.reduce = reduce

    def forward(self, x: Tensor) -> Tensor:
        """Return the joined branches of a clip."""
        return join([branch(x) for branch in self.branches], self.reduce)


class Residual(nn.Module):
    r"""A module and a shortcut, aligned (`paper <https://arxiv.org/abs/2306.13474>`_).

    .. math:: y_t = f(x)_t + g(x)_{t + (T_g - T_f) / 2}

    Args:
        fn: f, a module on clips; without padding over time its clips are shorter than its input.
        shortcut: g, the identity by default.

    Shapes:
        - input: :math:`(N, C, T, ...)`
        - output: :math:`(N, C', T', ...)`
    """

    def __init__(self, fn: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.fn = fn
        self.shortcut = nn.Identity() if shortcut is None else shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Return the module's output with the shortcut added."""
        return join([self.fn(x), self.shortcut(x)])
