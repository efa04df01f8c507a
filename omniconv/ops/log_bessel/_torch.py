"""Plain torch: every formula on all elements, at harmless places where it does not hold, and the right one taken.

That is some hundreds of pointwise operations, which torch.compile fuses into one.
"""

from typing import Any

import torch
from torch import Tensor

from omniconv.ops.dispatch import needs_grad
from omniconv.ops.log_bessel import _formulas
from omniconv.ops.log_bessel._coefficients import FAR, LONG, NEAR_ROOT, ROOT, SPLIT, TEMME, TERMS


class Functions:
    """The elementary functions of tensors."""

    log, log1p, exp, sqrt, floor = torch.log, torch.log1p, torch.exp, torch.sqrt, torch.floor

    @staticmethod
    def half(x: Tensor) -> Tensor:
        return x.float().double()

    @staticmethod
    def where(condition: Tensor, a: Any, b: Any) -> Tensor:
        return torch.where(condition, a, b)


def run(v: Tensor, x: Tensor, second: bool) -> Tensor:
    """Compute in float64, and round to the type of `x`."""
    m, dtype = Functions, x.dtype
    v, x = v.double(), x.double()
    inside = (v >= 0) & (x > 0) & (v + x < torch.inf)
    v, x = torch.where(inside, v, 0.0), torch.where(inside, x, 1.0)
    far = v * v + x * x >= FAR * FAR
    root = far & ((x - ROOT[0] * v).abs() < NEAR_ROOT * v)
    beside = _formulas.exponent(m, torch.where(far, v, 0.0), torch.where(far, x, FAR))
    at = _formulas.exponent_near_root(m, torch.where(root, v, 1.0), torch.where(root, x, ROOT[0]))
    exponent = torch.where(root, at, beside)
    result = _formulas.far(m, torch.where(far, v, 0.0), torch.where(far, x, FAR), exponent, second, TERMS)
    v, x = torch.where(far, 0.0, v), torch.where(far, 1.0, x)
    if second:
        near = x < SPLIT
        below = _formulas.second_near(
            m, torch.where(near, v, 0.0), torch.where(near, x, 1.0), int(FAR), TEMME
        )
        beyond = _formulas.second(m, torch.where(near, 0.0, v), torch.where(near, SPLIT, x))
        close = torch.where(near, below, beyond)
    else:
        close = _formulas.first(m, v, x, LONG)
    return torch.where(inside, torch.where(far, result, close), torch.nan).to(dtype)


def supports(v: Tensor, x: Tensor, second: bool) -> str | None:
    """Return None: every call is supported."""
    return None


def estimate(v: Tensor, x: Tensor, second: bool) -> float:
    """Return about how many seconds the hundreds of operations take on a CPU."""
    operations = 600 if second else 350
    gradient = 3 if needs_grad(v, x) else 1
    return gradient * operations * (3e-6 + 6e-10 * x.numel())
