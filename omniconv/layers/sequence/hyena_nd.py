"""Hyena over maps of any number of axes: gates and convolutions as large as the map, in the place of attention.

Paper: Zimerman and Wolf, Multi-Dimensional Hyena for Spatial Inductive Bias, https://arxiv.org/abs/2309.13600. The
kernels are functions of the position that a small network learns, so their number of weights does not grow with the
map, and the cost grows as L log L with its L pixels.
"""

import functools
import itertools
import math
import operator
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.cases import Case, Raises
from omniconv.ops.long_conv.api import long_conv

__all__ = ["HyenaNd"]

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class _SineNetwork(nn.Module):
    """Three linear layers with sines of trained frequency between them."""

    def __init__(self, features: int, width: int, channels: int, frequency: float, **place) -> None:
        super().__init__()
        self.initial = frequency
        self.first = nn.Linear(features, width, **place)
        self.second = nn.Linear(width, width, **place)
        self.last = nn.Linear(width, channels, bias=False, **place)
        self.frequency = nn.Parameter(torch.empty(2, width, **place))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for layer in (self.first, self.second, self.last):
            layer.reset_parameters()
        nn.init.constant_(self.frequency, self.initial)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sin(self.frequency[0] * self.first(x))
        return self.last(torch.sin(self.frequency[1] * self.second(x)))


class HyenaFilter(nn.Module):
    """The kernels of `HyenaNd`, whose docstring has their equation; called with the sizes S, gives (C, *S)."""

    def __init__(
        self, channels: int, axes: int, product: bool, learned_decay: bool, width: int, bands: int,
        frequency: float, shift: float, **place,
    ) -> None:  # fmt: skip
        super().__init__()
        self.product, self.bands, self.shift = product, bands, shift
        count, features = (axes, 1 + 2 * bands) if product else (1, axes * (1 + 2 * bands))
        self.networks = nn.ModuleList(
            _SineNetwork(features, width, channels, frequency, **place) for _ in range(count)
        )
        self.rates = nn.Parameter(torch.empty(axes, channels, **place), requires_grad=learned_decay)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new networks; the rates are spread anew."""
        for network in self.networks:
            network.reset_parameters()  # pyright: ignore[reportCallIssue]
        slow, fast = math.log(100) / 1.5, math.log(100) / 0.3
        self.rates.copy_(torch.linspace(slow, fast, self.rates.shape[1], device=self.rates.device))

    def forward(self, sizes: Sequence[int]) -> Tensor:
        """Return the kernels (C, *S)."""
        features, windows = [], []
        for axis, size in enumerate(sizes):
            ones = self.rates.new_ones([size if a == axis else 1 for a in range(len(sizes))])
            t = ((ones.cumsum(axis) - 1) / torch.sym_max(size - 1, 1)).unsqueeze(-1)
            turns = 2 * math.pi * t * self.rates.new_ones(self.bands).cumsum(0)
            features.append(torch.cat([t, turns.cos(), turns.sin()], -1))
            windows.append(torch.exp(-t * self.rates[axis].abs()) + self.shift)
        if self.product:
            factors = [network(of_axis) for network, of_axis in zip(self.networks, features, strict=True)]
        else:
            factors = [self.networks[0](torch.cat([of_axis.expand(*sizes, -1) for of_axis in features], -1))]
        return functools.reduce(operator.mul, factors + windows).movedim(-1, 0)


class HyenaNd(nn.Module):
    r"""Gated long convolutions over a map (`Hyena N-D <https://arxiv.org/abs/2309.13600>`_).

    .. math:: y = W_o\, v_n, \qquad v_{i+1} = x_i \odot v_i * k_i, \qquad v_n = x_0 \odot v_{n-1}

    where gates :math:`x_i` and v are projections of the input, convolved with 3 weights along every axis, and kernels
    are functions of the position t, from 0 to 1 along every axis,

    .. math:: k(t) = \mathrm{MLP}\bigl(e(t_1), \dots, e(t_d)\bigr) \prod_a \bigl(e^{-\alpha_a t_a} + s\bigr)
        \qquad\text{or}\qquad
        k(t) = \prod_a \mathrm{MLP}_a\bigl(e(t_a)\bigr) \bigl(e^{-\alpha_a t_a} + s\bigr),

    with :math:`e(t) = (t, \cos 2 \pi b t, \sin 2 \pi b t)`, b = 1 ... `bands`, and sines between the three layers of
    the networks. Rates :math:`\alpha` are spread over the channels, from the one that leaves 1% after 1.5 maps to the
    one that leaves it after 0.3.

    Args:
        channels: channels C.
        axes: d, 1 to 3.
        order: n, projections beside v; there are n - 1 convolutions.
        directions: "causal": no output sees a pixel with a larger index along any axis; "alternate": every other
            convolution runs backwards; "all": one operator for each of the 2^d corners, mixed by :math:`W_o`.
        product: have a network for every axis and multiply, which makes kernels of rank one.
        learned_decay: train the rates, one for every channel and axis.
        width: of the networks.
        bands: frequencies of e.
        frequency: of the sines at first; they are trained.
        shift: s, what the windows never fall below.
        device, dtype: of the parameters.

    Shapes:
        - input and output: :math:`(N, C, *S)` with d axes S

    Raises:
        ValueError: if `axes`, `order` or `directions` is none of the above.
    """

    def __init__(
        self,
        channels: int,
        axes: int = 2,
        *,
        order: int = 2,
        directions: Literal["causal", "alternate", "all"] = "all",
        product: bool = False,
        learned_decay: bool = False,
        width: int = 64,
        bands: int = 4,
        frequency: float = 10.0,
        shift: float = 0.05,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if axes not in _CONV:
            raise ValueError(f"axes must be 1, 2 or 3: got {axes}")
        if directions not in ("causal", "alternate", "all"):
            raise ValueError(f"directions must be 'causal', 'alternate' or 'all': got {directions!r}")
        least = 3 if directions == "alternate" else 2
        if order < least:
            raise ValueError(f"order must be at least {least} for directions {directions!r}: got {order}")
        place = {"device": device, "dtype": dtype}
        self.order, self.directions = order, directions
        spatial = tuple(range(2, 2 + axes))
        corners = itertools.chain.from_iterable(itertools.combinations(spatial, n) for n in range(axes + 1))
        self.corners = list(corners) if directions == "all" else [()]
        wide = channels * len(self.corners)
        conv = _CONV[axes]
        self.project = conv(channels, (order + 1) * channels, 1, **place)
        self.short = conv(
            (order + 1) * channels, (order + 1) * channels, 3, groups=(order + 1) * channels, **place
        )
        self.filter = HyenaFilter(
            (order - 1) * wide, axes, product, learned_decay, width, bands, frequency, shift, **place
        )
        self.skip = nn.Parameter(torch.empty(order - 1, wide, **place))
        self.mix = conv(wide, channels, 1, **place)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights."""
        for module in (self.project, self.short, self.filter, self.mix):
            module.reset_parameters()
        nn.init.normal_(self.skip)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the pixels of `x`."""
        sizes = x.shape[2:]
        spatial = tuple(range(2, x.ndim))
        # Whoever must not see the future has all zeros in front.
        sides = (1, 1) if self.directions == "all" else (2, 0)
        z = self.short(F.pad(self.project(x), sides * len(sizes)))
        *gates, v = (
            torch.cat([part.flip(corner) for corner in self.corners], 1)
            for part in z.chunk(self.order + 1, 1)
        )
        for i, kernel in enumerate(self.filter(sizes).chunk(self.order - 1)):
            back = spatial if self.directions == "alternate" and i % 2 else ()
            v = long_conv(v.flip(back), kernel, self.skip[i], gate_in=gates[i + 1].flip(back)).flip(back)
        y = (gates[0] * v).chunk(len(self.corners), 1)
        return self.mix(
            torch.cat([part.flip(corner) for part, corner in zip(y, self.corners, strict=True)], 1)
        )


def _case(id: str, x: tuple[int, ...], raises: tuple[Raises, ...] = (), **more) -> Case:
    arguments = {"channels": 3, "axes": len(x) - 2, "width": 5, "bands": 2, "frequency": 2.0, **more}
    return Case(
        HyenaNd, arguments, inputs=(x,), output=x, id=id, vary=(0, *range(2, len(x))),
        minimal=(1, 3, *(1,) * (len(x) - 2)), raises=raises,
    )  # fmt: skip


CASES = (
    _case(
        "all",
        (2, 3, 5, 4),
        raises=(
            Raises(ValueError, "axes must be 1, 2 or 3: got 4", {"axes": 4}),
            Raises(
                ValueError,
                "directions must be 'causal', 'alternate' or 'all': got 'both'",
                {"directions": "both"},
            ),
            Raises(
                ValueError,
                "order must be at least 3 for directions 'alternate': got 2",
                {"directions": "alternate"},
            ),
        ),
    ),
    _case("alternate", (2, 3, 4, 5), order=3, directions="alternate", product=True, learned_decay=True),
    _case("1d", (2, 3, 7), directions="causal"),
)
