"""Four corner convolutions side by side: together they see in all directions, and each has a fast inverse.

Paper: Kallappa, Nagar and Varma, FInC Flow: Fast and Invertible k x k Convolutions for Normalizing Flows,
https://arxiv.org/abs/2301.09266.
"""

import torch
from torch import Tensor, nn

from omniconv.core.cases import Case, Raises
from omniconv.layers.conv.inverse import CORNERS, CornerConv2d

__all__ = ["FInCUnit"]


class FInCUnit(nn.Module):
    r"""Invertible convolution of `FInC Flow <https://arxiv.org/abs/2301.09266>`_: every quarter of the channels from a
    corner of its own.

    .. math:: y = [\, W_1 \ast_{\ulcorner} x_1,\; W_2 \ast_{\urcorner} x_2,\; W_3 \ast_{\llcorner} x_3,\; W_4
        \ast_{\lrcorner} x_4 \,]

    The determinant of its Jacobian is 1. Only one tap of each kernel is masked, C' (C' + 1) / 2 of k^2 C'^2 weights for
    C' = C / 4 channels.

    Args:
        channels: C, divisible by 4.
        kernel_size: k.
        device, dtype: of the parameters.

    Shapes:
        - input and output: :math:`(N, C, H, W)`

    Raises:
        ValueError: if `channels` is not divisible by 4 or `kernel_size` is not positive.
    """

    def __init__(self, channels: int, kernel_size: int = 3, *, device=None, dtype=None) -> None:
        super().__init__()
        if channels % 4:
            raise ValueError(f"channels must be divisible by 4: got {channels}")
        self.quarters = [channels // 4] * 4
        self.corners = nn.ModuleList(
            CornerConv2d(channels // 4, kernel_size, corner, device=device, dtype=dtype) for corner in CORNERS
        )

    def reset_parameters(self) -> None:
        """Draw small weights: the unit starts near the identity."""
        for corner in self.corners:
            corner.reset_parameters()  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        """Convolve the quarters of `x`."""
        parts = zip(self.corners, x.split(self.quarters, 1), strict=True)
        return torch.cat([corner(part) for corner, part in parts], 1)

    def inverse(self, y: Tensor) -> Tensor:
        """Return the maps that the unit turns into `y`."""
        parts = zip(self.corners, y.split(self.quarters, 1), strict=True)
        return torch.cat([corner.inverse(part) for corner, part in parts], 1)  # type: ignore[operator]


CASES = (
    Case(
        FInCUnit,
        {"channels": 8, "kernel_size": 3},
        inputs=((2, 8, 7, 5),),
        output=(2, 8, 7, 5),
        minimal=(1, 8, 1, 1),
        raises=(Raises(ValueError, "channels must be divisible by 4: got 6", {"channels": 6}),),
    ),
)
