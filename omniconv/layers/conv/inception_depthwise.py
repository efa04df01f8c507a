"""Inception depthwise convolution: a small square kernel and two bands on a few channels, the others pass.

Paper: Yu et al., InceptionNeXt, https://arxiv.org/abs/2303.16900. A 7x7 depthwise convolution is slow for the memory
that it moves rather than for its multiply-adds; this layer leaves five eighths of the channels alone.
"""

from typing import Any

import torch
from torch import Tensor, nn

from omniconv.core.cases import Case, Raises

__all__ = ["InceptionDepthwiseConv2d"]


class InceptionDepthwiseConv2d(nn.Module):
    r"""Token mixer of `InceptionNeXt <https://arxiv.org/abs/2303.16900>`_.

    .. math:: y = [\, x_0,\; k_{s \times s} * x_1,\; k_{1 \times b} * x_2,\; k_{b \times 1} * x_3 \,]

    with depthwise kernels on :math:`g = \lfloor r C \rfloor` channels each and :math:`x_0` the first C - 3 g.
    Parameter names are those of the public weights.

    Args:
        channels: channels C.
        square_kernel_size: s, odd.
        band_kernel_size: b, odd.
        branch_ratio: r, the share of the channels that each of the three convolutions takes.
        device, dtype: of the parameters.

    Shapes:
        - input and output: :math:`(N, C, H, W)`

    Raises:
        ValueError: if a kernel size is even, or the branches take no channel or more than there are.
    """

    def __init__(
        self,
        channels: int,
        square_kernel_size: int = 3,
        band_kernel_size: int = 11,
        branch_ratio: float = 0.125,
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        for size in (square_kernel_size, band_kernel_size):
            if size < 1 or size % 2 == 0:
                raise ValueError(f"kernel sizes must be odd and positive: got {size}")
        group = int(channels * branch_ratio)
        if not 1 <= group <= channels // 3:
            raise ValueError(
                f"branch_ratio {branch_ratio} of {channels} channels must give 1 to {channels // 3}"
            )
        self.splits = (channels - 3 * group, group, group, group)

        def depthwise(height: int, width: int) -> nn.Conv2d:
            options: dict[str, Any] = {"groups": group, "device": device, "dtype": dtype}
            return nn.Conv2d(group, group, (height, width), padding=(height // 2, width // 2), **options)

        self.dwconv_hw = depthwise(square_kernel_size, square_kernel_size)
        self.dwconv_w = depthwise(1, band_kernel_size)
        self.dwconv_h = depthwise(band_kernel_size, 1)

    def reset_parameters(self) -> None:
        """Draw new weights."""
        for conv in (self.dwconv_hw, self.dwconv_w, self.dwconv_h):
            conv.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Convolve the last channels of `x`, and pass the first ones on."""
        rest, square, wide, high = x.split(self.splits, 1)
        return torch.cat((rest, self.dwconv_hw(square), self.dwconv_w(wide), self.dwconv_h(high)), 1)


CASES = (
    Case(
        InceptionDepthwiseConv2d,
        {"channels": 16, "band_kernel_size": 9},
        inputs=((2, 16, 7, 5),),
        output=(2, 16, 7, 5),
        minimal=(1, 16, 1, 1),
        raises=(
            Raises(
                ValueError,
                "kernel sizes must be odd and positive: got 10",
                {"channels": 16, "band_kernel_size": 10},
            ),
            Raises(ValueError, "branch_ratio 0.125 of 7 channels must give 1 to 2", {"channels": 7}),
        ),
    ),
    Case(
        InceptionDepthwiseConv2d,
        {"channels": 8, "square_kernel_size": 5, "branch_ratio": 0.25},
        inputs=((2, 8, 4, 11),),
        output=(2, 8, 4, 11),
        id="wide",
        minimal=(1, 8, 1, 1),
    ),
)
