"""The von Mises-Fisher distribution on the sphere, in dimensions where its Bessel functions exceed floating point.

Paper: Plesner et al., https://arxiv.org/abs/2409.08729, whose example this is. The density is
C_d(kappa) exp(kappa <mean, x>) for unit vectors x of d numbers.
"""

import math

import torch
from torch import Tensor

from omniconv.ops.log_bessel.iv import log_iv

__all__ = ["fit_vmf", "sample_vmf", "vmf_log_normalizer", "vmf_mean_length"]


def vmf_log_normalizer(kappa: Tensor, dim: int) -> Tensor:
    r"""Logarithm of the normaliser of the von Mises-Fisher density.

    .. math:: \log C_d(\kappa) = (\tfrac d2 - 1) \log \kappa - \tfrac d2 \log 2\pi - \log I_{d/2-1}(\kappa)

    Args:
        kappa: concentration, positive.
        dim: d, at least 2.

    Shapes:
        - kappa and output: any
    """
    order = dim / 2 - 1
    return order * torch.log(kappa) - dim / 2 * math.log(2 * math.pi) - log_iv(order, kappa)


def vmf_mean_length(kappa: Tensor, dim: int) -> Tensor:
    r"""Length of the mean vector, :math:`A_d(\kappa) = I_{d/2}(\kappa) / I_{d/2-1}(\kappa)`.

    Args:
        kappa: concentration, positive.
        dim: d, at least 2.

    Shapes:
        - kappa and output: any
    """
    return torch.exp(log_iv(dim / 2, kappa) - log_iv(dim / 2 - 1, kappa))


def fit_vmf(x: Tensor, steps: int = 10) -> tuple[Tensor, Tensor]:
    r"""Fit the most likely mean direction and concentration.

    The concentration solves :math:`A_d(\kappa) = R` where R is the length of the mean of x. Newton's method starts at
    Banerjee's :math:`R (d - R^2) / (1 - R^2)`, with :math:`A' = 1 - A^2 - \tfrac{d-1}{\kappa} A`.

    Args:
        x: unit vectors.
        steps: Newton's, more than enough.

    Shapes:
        - x: :math:`(N, d)`
        - output: mean direction :math:`(d)`, and concentration, a float64 number

    Raises:
        ValueError: if x is not (N, d) with d of at least 2.
    """
    if x.ndim != 2 or x.shape[1] < 2:
        raise ValueError(f"x must be (N, d), unit vectors of at least two numbers: got {tuple(x.shape)}")
    dim = x.shape[1]
    mean = x.double().mean(0)
    length = mean.norm()
    kappa = length * (dim - length**2) / (1 - length**2)
    for _ in range(steps):
        ratio = vmf_mean_length(kappa, dim)
        step = (ratio - length) / (1 - ratio**2 - (dim - 1) / kappa * ratio)
        # Never more than halfway to zero.
        kappa = torch.maximum(kappa - step, kappa / 2)
    return (mean / length).to(x.dtype), kappa


def sample_vmf(mean: Tensor, kappa: float, count: int) -> Tensor:
    """Draw unit vectors, by Wood's rejection of the component along the mean; with torch's global generator.

    Args:
        mean: unit vector.
        kappa: concentration, positive.
        count: N.

    Shapes:
        - mean: :math:`(d)`
        - output: :math:`(N, d)`

    Raises:
        ValueError: if mean is not one vector of at least two numbers.
    """
    if mean.ndim != 1 or len(mean) < 2:
        raise ValueError(f"mean must be (d,), a unit vector of at least two numbers: got {tuple(mean.shape)}")
    free = len(mean) - 1
    b = free / (2 * kappa + math.sqrt(4 * kappa**2 + free**2))
    best = (1 - b) / (1 + b)
    most = kappa * best + free * math.log1p(-(best**2))
    half = torch.tensor(free / 2, dtype=torch.float64, device=mean.device)
    proposal = torch.distributions.Beta(half, half)
    along = mean.new_empty(0, dtype=torch.float64)
    while len(along) < count:
        z = proposal.sample((count,))
        w = (1 - (1 + b) * z) / (1 - (1 - b) * z)
        height = kappa * w + free * torch.log1p(-best * w) - most
        along = torch.cat([along, w[torch.log(torch.rand_like(w)) <= height]])
    along = along[:count, None]
    # A normal direction, freed of its part along the mean.
    across = torch.randn(count, len(mean), dtype=torch.float64, device=mean.device)
    axis = mean.double()
    across = across - (across @ axis)[:, None] * axis
    across = across / across.norm(dim=1, keepdim=True)
    return (along * axis + torch.sqrt(1 - along**2) * across).to(mean.dtype)
