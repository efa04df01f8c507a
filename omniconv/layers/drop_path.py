"""Stochastic depth: whole residual branches are dropped, sample by sample."""

import torch
from torch import Tensor, nn

from omniconv.core.cases import Case, Raises

__all__ = ["DropPath"]


class DropPath(nn.Module):
    r"""Stochastic depth per sample, from `Deep Networks with Stochastic Depth <https://arxiv.org/abs/1603.09382>`_.

    .. math:: y_n = \frac{b_n}{1 - p} x_n, \qquad b_n \sim \mathrm{Bernoulli}(1 - p)

    in training mode, and the identity in eval mode.

    Args:
        p: probability with which a sample's branch is dropped, in [0, 1).

    Shapes:
        - input and output: :math:`(N, *)`

    Raises:
        ValueError: if `p` lies outside [0, 1).
    """

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"p must lie in [0, 1): got {p}")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Drop whole samples of `x` and rescale the others."""
        if not self.training or self.p == 0:
            return x
        kept = torch.rand(x.shape[0], *(1,) * (x.ndim - 1), device=x.device) >= self.p
        return x * (kept.to(x.dtype) / (1 - self.p))

    def extra_repr(self) -> str:
        """Show the probability."""
        return f"p={self.p}"


CASES = (
    Case(
        DropPath,
        {"p": 0.25},
        inputs=((3, 4, 5, 7),),
        output=(3, 4, 5, 7),
        minimal=(1, 1, 1, 1),
        raises=(Raises(ValueError, "p must lie in [0, 1): got 1", {"p": 1}),),
    ),
)
