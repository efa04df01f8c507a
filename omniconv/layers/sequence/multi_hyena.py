"""MultiHyena: Hyena with heads, whose channels share one long filter and are mixed by outer products.

Paper: Massaroli et al., Laughing Hyena Distillery, https://arxiv.org/abs/2310.18780, section 4. Fewer filters
mean fewer recurrences to distil, and what a head carries through time is a matrix of keys and values, as in linear
attention.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.cases import Case, Raises
from omniconv.layers.sequence.hyena_nd import HyenaFilter
from omniconv.ops.long_conv.api import long_conv

__all__ = ["MultiHyena", "outer_heads", "read_heads"]


def outer_heads(key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Return the products of all values and keys of a head, from (N, C, *L) to (N (C / M)^2, M, *L) for M heads."""
    k, v = (part.unflatten(1, (heads, -1)) for part in (key, value))
    return (v.unsqueeze(3) * k.unsqueeze(2)).movedim(1, 3).flatten(0, 2)


def read_heads(memory: Tensor, query: Tensor) -> Tensor:
    """Return what queries (N, C, *L) read of the products that `outer_heads` made."""
    heads, width = memory.shape[1], query.shape[1] // memory.shape[1]
    products = memory.unflatten(0, (-1, width, width)).movedim(3, 1)
    return (products * query.unflatten(1, (heads, 1, width))).sum(3).flatten(1, 2)


class MultiHyena(nn.Module):
    r"""Causal Hyena with M heads that share filters (`Laughing Hyena <https://arxiv.org/abs/2310.18780>`_).

    .. math:: y = W_o\, z, \qquad z^m_t = \sum_{u \le t} h^m_{t-u}\, (v^m_u\, {k^m_u}^\top)\, q^m_t

    where q, k and v are projections of the input, convolved with 3 weights over time, and the filters
    :math:`h^m` are those of `omniconv.layers.sequence.hyena_nd.HyenaNd`. With as many heads as channels it is Hyena of
    order 2.

    Args:
        channels: channels C.
        heads: M, a divisor of C.
        width: of the network that makes the filters.
        bands: frequencies that it sees of the position.
        frequency: of its sines at first; they are trained.
        shift: what the filters' windows never fall below.
        device, dtype: of the parameters.

    Shapes:
        - input and output: :math:`(N, C, L)`

    Raises:
        ValueError: if `heads` does not divide `channels`.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        *,
        width: int = 64,
        bands: int = 4,
        frequency: float = 10.0,
        shift: float = 0.05,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if heads < 1 or channels % heads:
            raise ValueError(f"heads must divide channels: got {heads} and {channels}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.heads = heads
        self.project = nn.Conv1d(channels, 3 * channels, 1, **place)
        self.short = nn.Conv1d(3 * channels, 3 * channels, 3, groups=3 * channels, **place)
        self.filter = HyenaFilter(heads, 1, False, False, width, bands, frequency, shift, **place)
        self.skip = nn.Parameter(torch.empty(heads, **place))
        self.mix = nn.Conv1d(channels, channels, 1, **place)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights."""
        for module in (self.project, self.short, self.filter, self.mix):
            module.reset_parameters()
        nn.init.normal_(self.skip)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the steps of `x`."""
        query, key, value = self.short(F.pad(self.project(x), (2, 0))).chunk(3, 1)
        memory = long_conv(outer_heads(key, value, self.heads), self.filter(x.shape[2:]), self.skip)
        return self.mix(read_heads(memory, query))


CASES = (
    Case(
        MultiHyena,
        {"channels": 6, "heads": 2, "width": 5, "bands": 2, "frequency": 2.0},
        inputs=((2, 6, 7),),
        output=(2, 6, 7),
        vary=(0, 2),
        minimal=(1, 6, 1),
        raises=(Raises(ValueError, "heads must divide channels: got 4 and 6", {"heads": 4}),),
    ),
)
