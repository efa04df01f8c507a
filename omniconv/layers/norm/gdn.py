"""Generalised divisive normalisation: every channel is divided by a learned pool of the energies of all channels.

Papers: Balle et al., Density Modeling of Images using a Generalized Normalization Transformation,
https://arxiv.org/abs/1511.06281; the simplified form, Johnston et al., https://arxiv.org/abs/1912.08771. Parameters
hold square roots, so that whatever a training makes of them, the pool stays positive.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.cases import Case, Raises

__all__ = ["GeneralizedDivisiveNorm"]

_MIN_BETA = 1e-6
_CONV = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


class GeneralizedDivisiveNorm(nn.Module):
    r"""`Generalised divisive normalisation <https://arxiv.org/abs/1511.06281>`_ (GDN), or its inverse.

    .. math:: y_i = \frac{x_i}{\sqrt{\beta_i + \sum_j \gamma_{ij} x_j^2}}, \qquad
              y_i = \frac{x_i}{\beta_i + \sum_j \gamma_{ij} |x_j|} \text{ where simplified}

    at every position, with :math:`\beta, \gamma > 0`. The approximate inverse multiplies by the denominator.

    Args:
        channels: channels C.
        inverse: multiply instead of divide.
        simplified: absolute values and no root (GDN1), which is cheaper and codes as well.
        device, dtype: of the parameters.

    Shapes:
        - input and output: :math:`(N, C, *)` with one to three axes behind C

    Raises:
        ValueError: if `channels` is not positive, or an input has not two to four axes beside N.
    """

    def __init__(
        self, channels: int, *, inverse: bool = False, simplified: bool = False, device=None, dtype=None
    ) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels must be positive: got {channels}")
        self.inverse, self.simplified = inverse, simplified
        self.beta = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.gamma = nn.Parameter(torch.empty(channels, channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with beta of one, and gamma of 0.1 for the channel itself and nearly nothing for the others."""
        nn.init.ones_(self.beta)
        # At exactly zero a square root would have no gradient.
        nn.init.constant_(self.gamma, 1e-3)
        with torch.no_grad():
            self.gamma.fill_diagonal_(0.1**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Divide every channel of `x` by its pool, or multiply."""
        if x.ndim not in _CONV:
            raise ValueError(f"input must be (N, C, *) with one to three axes behind C: got {x.ndim} axes")
        gamma = self.gamma.square()[(...,) + (None,) * (x.ndim - 2)]
        beta = self.beta.square() + _MIN_BETA
        pool = _CONV[x.ndim](x.abs() if self.simplified else x.square(), gamma, beta)
        if self.simplified:
            return x * pool if self.inverse else x / pool
        return x * (pool.sqrt() if self.inverse else pool.rsqrt())

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"{len(self.beta)}, inverse={self.inverse}, simplified={self.simplified}"


CASES = (
    Case(
        GeneralizedDivisiveNorm,
        {"channels": 6},
        inputs=((2, 6, 7, 5),),
        output=(2, 6, 7, 5),
        minimal=(1, 6, 1, 1),
        raises=(
            Raises(ValueError, "channels must be positive: got 0", {"channels": 0}),
            Raises(
                ValueError,
                "input must be (N, C, *) with one to three axes behind C: got 2 axes",
                inputs=((2, 6),),
            ),
        ),
    ),
    Case(
        GeneralizedDivisiveNorm,
        {"channels": 5, "inverse": True, "simplified": True},
        inputs=((2, 5, 9),),
        output=(2, 5, 9),
        id="inverse_simplified_1d",
        vary=(0, 2),
        minimal=(1, 5, 1),
    ),
)
