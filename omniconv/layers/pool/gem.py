"""Generalized-mean pooling: between the average and the maximum, at a point that is learned.

Paper: Radenovic et al., Fine-tuning CNN Image Retrieval with No Human Annotation, https://arxiv.org/abs/1711.02512.
"""

import torch
from torch import Tensor, nn

from omniconv.core.cases import Case, Raises

__all__ = ["GeneralizedMeanPool2d"]


class GeneralizedMeanPool2d(nn.Module):
    r"""Global pooling of `GeM <https://arxiv.org/abs/1711.02512>`_.

    .. math:: y_c = \Bigl(\frac{1}{HW} \sum_{h,w} \max(x_{chw}, \epsilon)^p\Bigr)^{1/p}

    p = 1 is the average of the positive part, p towards infinity the maximum.

    Args:
        p: exponent at the start, positive; one for all channels, and learned.
        eps: :math:`\epsilon`, below which values are cut off.
        device, dtype: of the parameters.

    Shapes:
        - input: :math:`(N, C, H, W)`
        - output: :math:`(N, C)`

    Raises:
        ValueError: if `p` is not positive.
    """

    def __init__(self, p: float = 3.0, eps: float = 1e-6, *, device=None, dtype=None) -> None:
        super().__init__()
        if p <= 0:
            raise ValueError(f"p must be positive: got {p}")
        self.start, self.eps = p, eps
        self.p = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the exponent to what it was at the start."""
        nn.init.constant_(self.p, self.start)

    def forward(self, x: Tensor) -> Tensor:
        """Pool every channel of `x`."""
        return x.clamp(min=self.eps).pow(self.p).mean((2, 3)).pow(1 / self.p)

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"p={self.start}, eps={self.eps}"


CASES = (
    Case(
        GeneralizedMeanPool2d,
        {},
        inputs=((2, 5, 7, 3),),
        output=(2, 5),
        minimal=(1, 5, 1, 1),
        channels_last=False,
        raises=(Raises(ValueError, "p must be positive: got 0", {"p": 0}),),
    ),
)
