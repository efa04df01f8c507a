r"""The Poincare ball, a model of hyperbolic space: vectors of norm below :math:`1 / \sqrt c`, of curvature -c.

The formulas are those of Ganea et al., Hyperbolic Neural Networks, https://arxiv.org/abs/1805.09112; the midpoint
is that of van Spengler et al., Poincare ResNet, https://arxiv.org/abs/2303.14027. Vectors lie along axis `dim`, all
else broadcasts. The maps and the addition have backward passes of their own, which keep nothing but their inputs
(compiled programs, which choose by themselves what to keep, do without); results of maps stay a little inside the
ball, since on its rim distances are infinite.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "distance", "expmap", "expmap0", "gyration", "logmap", "logmap0", "midpoint", "mobius_add",
    "rim", "scale_radially", "transport",
]  # fmt: skip


def rim(dtype: torch.dtype) -> float:
    r"""Return the largest norm, in units of :math:`1 / \sqrt c`, that points get in arithmetic of `dtype`."""
    return 1 - (1e-5 if dtype == torch.float64 else 4e-3)


def _dot(x: Tensor, y: Tensor, dim: int) -> Tensor:
    return (x * y).sum(dim, keepdim=True)


class _Radial(NamedTuple):
    """f(s), its derivative, and the derivative of f(s) / s, over s, as a series in s^2 near 0."""

    value: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    series: tuple[float, float, float]


def _tanh_slope(s: Tensor) -> Tensor:
    # Beyond the rim the value stays the same.
    return torch.where(s.tanh() < rim(s.dtype), s.cosh() ** -2, 0)


_RADIAL = {
    "tanh": _Radial(lambda s: s.tanh().clamp(max=rim(s.dtype)), _tanh_slope, (-2 / 3, 8 / 15, -34 / 105)),
    "atanh": _Radial(torch.atanh, lambda s: 1 / (1 - s**2), (2 / 3, 4 / 5, 6 / 7)),
    "asinh": _Radial(torch.asinh, lambda s: (1 + s**2) ** -0.5, (-1 / 3, 3 / 10, -15 / 56)),
}


class _ScaleRadially(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, c: float, dim: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.options = name, c, dim
        return _scaled(x, name, c, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (x,), (grad,) = ctx.saved_tensors, grads
        name, c, dim = ctx.options
        radial, s = _RADIAL[name], _size(x, name, c, dim)
        factor = radial.value(s) / s
        # Near 0 the slope is a difference of almost equal numbers.
        first, second, third = radial.series
        near = s < (0.01 if x.dtype == torch.float64 else 0.1)
        series = first + s**2 * (second + s**2 * third)
        far = s.where(~near, 0.5)
        slope = torch.where(near, series, (radial.derivative(far) - factor) / far**2)
        return factor * grad + c * slope * _dot(grad, x, dim) * x, None, None, None


def _size(x: Tensor, name: str, c: float, dim: int) -> Tensor:
    # `vector_norm` takes 40 times as long on four channels that are not the last axis; the root needs a slope at 0.
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = (_dot(wide, wide, dim) + torch.finfo(wide.dtype).tiny).sqrt()
    s = math.sqrt(c) * norm.to(x.dtype)
    return s.clamp(1e-15, rim(x.dtype)) if name == "atanh" else s.clamp(min=1e-15)


def _scaled(x: Tensor, name: str, c: float, dim: int) -> Tensor:
    s = _size(x, name, c, dim)
    return _RADIAL[name].value(s) / s * x


def scale_radially(x: Tensor, name: str, c: float, dim: int = -1) -> Tensor:
    r"""Return x :math:`f(s) / s` with :math:`s = \sqrt c\, \lVert x \rVert` and f one of "tanh", "atanh" and
    "asinh".
    """
    if torch.compiler.is_compiling():
        return _scaled(x, name, c, dim)
    return _ScaleRadially.apply(x, name, c, dim)  # type: ignore[return-value]


def expmap0(v: Tensor, c: float, dim: int = -1) -> Tensor:
    r"""Return :math:`\tanh(\sqrt c \lVert v \rVert)\, v / (\sqrt c \lVert v \rVert)`: from the tangents at 0 to the
    ball.
    """
    return scale_radially(v, "tanh", c, dim)


def logmap0(y: Tensor, c: float, dim: int = -1) -> Tensor:
    r"""Return the tangent at 0 that leads to `y`, :math:`\mathrm{artanh}(\sqrt c \lVert y \rVert)\, y / (\sqrt c
    \lVert y \rVert)`.
    """
    return scale_radially(y, "atanh", c, dim)


class _MobiusAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, c: float, dim: int) -> Tensor:
        ctx.save_for_backward(x, y)
        ctx.options = c, dim
        return _mobius_sum(x, y, c, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (x, y), (grad,) = ctx.saved_tensors, grads
        c, dim = ctx.options
        a, b, d = _mobius_factors(x, y, c, dim)
        grad = grad / d
        gx, gy = _dot(grad, x, dim), _dot(grad, y, dim)
        total = (a * gx + b * gy) / d
        x2, y2 = _dot(x, x, dim), _dot(y, y, dim)
        for_x = a * grad - 2 * c * (gy + c * y2 * total) * x + 2 * c * (gx - total) * y
        for_y = b * grad + 2 * c * (gx - total) * x + 2 * c * (gx - c * x2 * total) * y
        return for_x.sum_to_size(x.shape), for_y.sum_to_size(y.shape), None, None


def _mobius_factors(x: Tensor, y: Tensor, c: float, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    x2, y2, xy = _dot(x, x, dim), _dot(y, y, dim), _dot(x, y, dim)
    return 1 + 2 * c * xy + c * y2, 1 - c * x2, (1 + 2 * c * xy + c**2 * x2 * y2).clamp(min=1e-15)


def _mobius_sum(x: Tensor, y: Tensor, c: float, dim: int) -> Tensor:
    a, b, d = _mobius_factors(x, y, c, dim)
    return (b * y + a * x) / d


def mobius_add(x: Tensor, y: Tensor, c: float, dim: int = -1) -> Tensor:
    r"""Return the Mobius sum of points.

    .. math:: x \oplus y = \frac{(1 + 2 c\, x \cdot y + c |y|^2)\, x + (1 - c |x|^2)\, y}
                                {1 + 2 c\, x \cdot y + c^2 |x|^2 |y|^2}
    """
    if torch.compiler.is_compiling():
        return _mobius_sum(x, y, c, dim)
    return _MobiusAdd.apply(x, y, c, dim)  # type: ignore[return-value]


def gyration(a: Tensor, b: Tensor, v: Tensor, c: float, dim: int = -1) -> Tensor:
    r"""Return the rotation :math:`\mathrm{gyr}[a, b] v = -(a \oplus b) \oplus (a \oplus (b \oplus v))` of vectors."""
    a2, b2, ab = _dot(a, a, dim), _dot(b, b, dim), _dot(a, b, dim)
    av, bv = _dot(a, v, dim), _dot(b, v, dim)
    for_a = -(c**2) * av * b2 + c * bv + 2 * c**2 * ab * bv
    for_b = -(c**2) * bv * a2 - c * av
    return v + 2 * (for_a * a + for_b * b) / (1 + 2 * c * ab + c**2 * a2 * b2).clamp(min=1e-15)


def _conformal(x: Tensor, c: float, dim: int) -> Tensor:
    return 2 / (1 - c * _dot(x, x, dim)).clamp(min=1e-15)


def expmap(x: Tensor, v: Tensor, c: float, dim: int = -1) -> Tensor:
    """Return the points to which tangents `v` at `x` lead."""
    return mobius_add(x, expmap0(_conformal(x, c, dim) / 2 * v, c, dim), c, dim)


def logmap(x: Tensor, y: Tensor, c: float, dim: int = -1) -> Tensor:
    """Return the tangents at `x` that lead to `y`."""
    return 2 / _conformal(x, c, dim) * logmap0(mobius_add(-x, y, c, dim), c, dim)


def transport(x: Tensor, y: Tensor, v: Tensor, c: float, dim: int = -1) -> Tensor:
    """Return tangents `v` at `x` carried along the geodesic to `y`."""
    return gyration(y, -x, v, c, dim) * _conformal(x, c, dim) / _conformal(y, c, dim)


def distance(x: Tensor, y: Tensor, c: float, dim: int = -1) -> Tensor:
    r"""Return the hyperbolic distance :math:`\frac{2}{\sqrt c} \mathrm{artanh}(\sqrt c\, |{-x} \oplus y|)`, without
    axis `dim`.
    """
    return 2 * torch.linalg.vector_norm(logmap0(mobius_add(-x, y, c, dim), c, dim), dim=dim)


def midpoint(x: Tensor, c: float, over: int | tuple[int, ...], dim: int = -1) -> Tensor:
    r"""Return the midpoint of points along the axes `over`, which stay with size 1.

    .. math:: \mu = \tfrac12 \otimes m, \qquad
              m = \frac{\sum_i \lambda_i x_i}{\sum_i (\lambda_i - 1)}, \qquad
              \lambda_i = \frac{2}{1 - c |x_i|^2}

    It is the mean of the points in hyperboloid coordinates, brought back to the ball: in closed form, where the
    Frechet mean needs an iteration.
    """
    factor = _conformal(x, c, dim)
    mean = (factor * x).sum(over, keepdim=True) / (factor - 1).sum(over, keepdim=True)
    root = (1 - c * _dot(mean, mean, dim)).clamp(min=1e-15).sqrt()
    return mean / (1 + root)
