"""Offsets that hardware likes: a kernel that only dilates, and whole pixels.

Paper: Huang et al., Algorithm-hardware Co-design for Deformable Convolution, https://arxiv.org/abs/2002.08357.
"""

import torch
from torch import Tensor

__all__ = ["round_offset", "square_offset"]


def square_offset(stretch: Tensor, kernel_size: int = 3, *, dilation: int = 1) -> Tensor:
    r"""Return the offsets of a square kernel that dilates by one number a position.

    .. math:: \Delta p_k(p_0) = a(p_0)\, p_k

    so that a whole number a gives the ordinary convolution of dilation 1 + a.

    Args:
        stretch: a, for every group.
        kernel_size: pixels along a side.
        dilation: of the kernel at rest, which counts into :math:`p_k`.

    Shapes:
        - stretch: :math:`(N, G, H, W)`
        - output: :math:`(N, 2 G K, H, W)`, what `deform_aggregate` takes
    """
    axis = torch.arange(kernel_size, device=stretch.device) - (kernel_size - 1) // 2
    taps = dilation * torch.cartesian_prod(axis, axis).flatten().to(stretch.dtype)
    return (stretch[:, :, None] * taps.view(-1, 1, 1)).flatten(1, 2)


def round_offset(offset: Tensor) -> Tensor:
    """Return the nearest whole numbers, through which gradients pass as if they were not rounded."""
    return offset + (offset.round() - offset).detach()
