"""Logarithms of modified Bessel functions as their definitions read; for orders and arguments up to a hundred or so."""

import math

import torch
from torch import Tensor

__all__ = ["reference"]


def reference(v: Tensor, x: Tensor, second: bool) -> Tensor:
    r"""Return the logarithm of the series or of the integral.

    .. math::
        I_v(x) = \sum_{k=0}^\infty \frac{(x/2)^{v + 2k}}{k!\, \Gamma(v + k + 1)} \qquad \text{or} \qquad
        K_v(x) = \int_0^\infty e^{-x \cosh t} \cosh(v t)\, dt = \tfrac12 \int_{-\infty}^\infty e^{v t - x \cosh t} dt
    """
    v, x = v[..., None], x[..., None]
    if second:
        # Beyond 12 the integrand is nothing for x >= 0.01.
        t = torch.linspace(-12, 12, 1537, dtype=x.dtype, device=x.device)
        terms = v * t - x * torch.cosh(t) + (t[1] - t[0]).log() - math.log(2)
    else:
        k = torch.arange(300, dtype=x.dtype, device=x.device)
        terms = (v + 2 * k) * torch.log(x / 2) - torch.lgamma(k + 1) - torch.lgamma(v + k + 1)
    return torch.logsumexp(terms, -1)
