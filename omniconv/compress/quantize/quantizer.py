"""The quantizer: a format, scaled to a tensor, a channel or a group of weights, that rounds and lets gradients pass.

Paper: Gholami et al., A Survey of Quantization Methods for Efficient Neural Network Inference,
https://arxiv.org/abs/2103.13630, whose choices (uniform or not, symmetric or not, static or dynamic, how the
range is found, how finely it is shared out) are the fields of `Scheme`. Learned step sizes: LSQ,
https://arxiv.org/abs/1902.08153.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.compress.quantize.formats import Codebook, Format, Integer
from omniconv.compress.quantize.ranges import RANGES

__all__ = ["ACTIVATIONS", "WEIGHTS", "Quantizer", "Scheme", "as_scheme"]


@dataclass(frozen=True)
class Scheme:
    """How a tensor is quantized.

    Attributes:
        format: which numbers there are.
        symmetric: zero is in the middle of the range; if not, whole numbers get a zero point.
        per: what has a range of its own: the "tensor", each "channel", or so many weights in a row of a channel.
        range: "minmax", "percentile" (99.9%), "mse" (least squared error) or "entropy"; see `RANGES`.
        full: of symmetric integers, the step is :math:`2 r / (2^k - 1)` for a range of r to either side, which uses
            the lowest code too and clips r by half a step; else it is :math:`r / (2^{k-1} - 1)`, as runtimes have it.
        dynamic: the extremes of every single input make the range, and no calibration is needed.
    """

    format: Format = field(default_factory=Integer)
    symmetric: bool = True
    per: Literal["tensor", "channel"] | int = "tensor"
    range: Literal["minmax", "percentile", "mse", "entropy"] = "minmax"
    full: bool = False
    dynamic: bool = False

    def __post_init__(self) -> None:
        if not self.symmetric and not isinstance(self.format, Integer):
            raise ValueError(f"only Integer has a zero point: got {self.format}; set symmetric=True")
        if self.per not in ("tensor", "channel") and (isinstance(self.per, str) or self.per < 1):
            raise ValueError(f"per must be tensor, channel or a number of weights: got {self.per!r}")
        if self.range not in RANGES:
            raise ValueError(f"range must be one of {', '.join(RANGES)}: got {self.range!r}")


WEIGHTS = Scheme(Integer(8), per="channel", range="mse")
"""Signed weights with a scale a channel."""
ACTIVATIONS = Scheme(Integer(8, signed=False), symmetric=False, range="mse")
"""Unsigned activations with one scale and one zero point; after a ReLU the zero point is 0."""


def as_scheme(bits: "int | Scheme", default: Scheme) -> Scheme:
    """Return a scheme: itself, or `default` in so many bits."""
    if isinstance(bits, Scheme):
        return bits
    form = cast(Integer, default.format)
    return replace(default, format=Integer(bits, form.signed))


class Quantizer(nn.Module):
    r"""Rounds a tensor to the nearest values of a format (`survey <https://arxiv.org/abs/2103.13630>`_).

    .. math:: Q(x) = s \left( \mathrm{round}\!\left( \mathrm{clip}(x / s + z) \right) - z \right)

    with the step s and the zero point z of the range that the scheme chooses. Gradients pass the rounding
    straight through, and are zero where x is clipped. After `learn_scale` the step is a parameter with the
    gradient of `LSQ <https://arxiv.org/abs/1902.08153>`_.

    Args:
        scheme: how to quantize.
        axis: of the channels: 0 in the weight of a convolution, 1 in activations.

    Shapes:
        - input, output: any
        - scale, zero: :math:`(R, 1)`, one for each of R ranges

    Raises:
        ValueError: when it is called and has no range; calibrate it first.
    """

    scale: Tensor
    zero: Tensor
    grid: Tensor

    def __init__(self, scheme: Scheme, axis: int = 0) -> None:
        super().__init__()
        self.scheme = scheme
        self.axis = axis
        self.register_buffer("scale", torch.empty(0))
        self.register_buffer("zero", torch.zeros(()), persistent=not scheme.symmetric)
        self.register_buffer("grid", scheme.format.grid(), persistent=isinstance(scheme.format, Codebook))

    def extra_repr(self) -> str:
        """Return the scheme."""
        return repr(self.scheme)

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.scheme.format.bits

    def rows(self, x: Tensor) -> Tensor:
        """Return `x` as (R, n), one row for each range; groups are filled up with zeros."""
        if self.scheme.per == "tensor":
            return x.reshape(1, -1)
        rows = x.movedim(self.axis, 0).flatten(1) if x.ndim > 1 else x[:, None]
        if isinstance(self.scheme.per, int):
            rows = F.pad(rows, (0, -rows.shape[1] % self.scheme.per)).reshape(-1, self.scheme.per)
        return rows

    def restore(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """Return what `rows` made rows of, in its `shape`."""
        if self.scheme.per == "tensor":
            return rows.reshape(shape)
        moved = (shape[self.axis], *shape[: self.axis], *shape[self.axis + 1 :])
        rows = rows.reshape(moved[0], -1)[:, : math.prod(moved[1:])]
        return rows.reshape(moved).movedim(0, self.axis)

    def _step(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return step and zero point of the range from `low` to `high`, widened to hold zero."""
        low, high = low.clamp(max=0), high.clamp(min=0)
        first, last = self.grid[0], self.grid[-1]
        if self.scheme.symmetric:
            half = (last - first) / 2 if self.scheme.full else last
            scale, zero = torch.maximum(-low, high) / half, torch.zeros_like(low)
        else:
            scale = (high - low) / (last - first)
            zero = first - (low / torch.where(scale > 0, scale, 1)).round()
        return torch.where(scale > 0, scale, 1), zero

    def _quantized(self, rows: Tensor, low: Tensor, high: Tensor) -> Tensor:
        scale, zero = self._step(low, high)
        return (self.scheme.format.round(rows / scale + zero, self.grid) - zero) * scale

    def find_range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the lowest and the highest value, (R, 1) each, that the scheme's method chooses for `x`."""
        with torch.no_grad():
            return RANGES[self.scheme.range](self.rows(x.detach()), self._quantized, len(self.grid))

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Take the step and the zero point that cover `low` to `high`, each (R, 1)."""
        with torch.no_grad():
            scale, zero = self._step(low, high)
            if isinstance(self.scale, nn.Parameter):
                self.scale.copy_(scale)
            else:
                self.scale = scale
            self.zero = zero if not self.scheme.symmetric else self.zero

    def calibrate(self, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> None:
        """Choose the range from `x` unless it is given, and the grid where it is learned."""
        if low is None or high is None:
            low, high = self.find_range(x)
        self.set_range(low, high)
        if isinstance(self.scheme.format, Codebook):
            self.grid = self.scheme.format.fit((self.rows(x) / self.scale).detach())

    def learn_scale(self) -> None:
        """Make the step a parameter."""
        scale = self.scale.detach().clone()
        del self.scale
        self.scale = nn.Parameter(scale)

    def fix_scale(self) -> None:
        """Make the step a buffer again."""
        scale = self.scale.detach().clone()
        del self.scale
        self.register_buffer("scale", scale)

    def _current(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        if self.scheme.dynamic:
            with torch.no_grad():
                return self._step(rows.amin(1, keepdim=True), rows.amax(1, keepdim=True))
        if self.scale.numel() == 0:
            raise ValueError("the quantizer has no range yet; call calibrate first")
        scale = self.scale
        if isinstance(scale, nn.Parameter):
            # Many weights move one step: their gradients are brought to the size of one weight's.
            damp = (rows.shape[1] * float(self.grid[-1])) ** -0.5
            scale = scale.clamp(min=1e-12)
            scale = scale * damp + (scale * (1 - damp)).detach()
        return scale, self.zero

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` rounded to what its codes stand for."""
        rows = self.rows(x)
        scale, zero = self._current(rows)
        ratio = (rows / scale + zero).clamp(self.grid[0], self.grid[-1])
        rounded = self.scheme.format.round(ratio.detach(), self.grid)
        return self.restore((ratio + (rounded - ratio).detach() - zero) * scale, x.shape)

    def encode(self, x: Tensor) -> Tensor:
        """Return the codes of `x`, int64: indices of the grid."""
        rows = self.rows(x.detach())
        scale, zero = self._current(rows)
        values = self.scheme.format.round(rows / scale + zero, self.grid)
        return self.restore(torch.searchsorted(self.grid, values.contiguous()), x.shape)

    def decode(self, codes: Tensor) -> Tensor:
        """Return what the codes stand for."""
        values = self.rows(self.grid[codes])
        return self.restore((values - self.zero) * self.scale.detach(), codes.shape)
