"""Blur before subsampling, so that a network's maps change less when its image is shifted.

Paper: Zhang, Making Convolutional Networks Shift-Invariant Again, https://arxiv.org/abs/1904.11486.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.cases import Case, Raises

__all__ = ["BlurPool2d"]


class BlurPool2d(nn.Module):
    r"""Subsampling of `Making Convolutional Networks Shift-Invariant Again <https://arxiv.org/abs/1904.11486>`_.

    .. math:: y_{ij} = \sum_{u,v} b_u b_v\, x_{si+u,\, sj+v}, \qquad
              b_u = 2^{1-k} \binom{k-1}{u + (k-1)/2}

    with the binomial filter b; beyond the border the map is mirrored.

    Args:
        kernel_size: k, odd; at most twice the smallest map's size, less one.
        stride: s.

    Shapes:
        - input: :math:`(N, C, H, W)`
        - output: :math:`(N, C, \lceil H / s \rceil, \lceil W / s \rceil)`

    Raises:
        ValueError: if `kernel_size` is even or below 3.
    """

    def __init__(self, kernel_size: int = 3, stride: int = 2) -> None:
        super().__init__()
        if kernel_size < 3 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and at least 3: got {kernel_size}")
        self.kernel_size, self.stride = kernel_size, stride

    def forward(self, x: Tensor) -> Tensor:
        """Blur and subsample `x`."""
        k = self.kernel_size
        row = x.new_tensor([math.comb(k - 1, u) / 2 ** (k - 1) for u in range(k)])
        kernel = torch.outer(row, row).expand(x.shape[1], 1, k, k)
        padded = F.pad(x, (k // 2,) * 4, mode="reflect")
        return F.conv2d(padded, kernel, stride=self.stride, groups=x.shape[1])

    def extra_repr(self) -> str:
        """Say what is not seen from the submodules."""
        return f"kernel_size={self.kernel_size}, stride={self.stride}"


CASES = (
    Case(
        BlurPool2d,
        {},
        inputs=((2, 3, 7, 10),),
        output=(2, 3, 4, 5),
        minimal=(1, 3, 2, 2),
        raises=(Raises(ValueError, "kernel_size must be odd and at least 3: got 4", {"kernel_size": 4}),),
    ),
)
