"""Deformable convolution in the forms that an embedded accelerator runs fast: depthwise, square, bounded, rounded.

Paper: Huang et al., Algorithm-hardware Co-design for Deformable Convolution, https://arxiv.org/abs/2002.08357. What
each form costs is in `omniconv.design.deform_hardware`.
"""

import math

import torch
from torch import Tensor, nn

from omniconv.core.cases import Case, Raises
from omniconv.ops.deform.api import deform_conv2d
from omniconv.ops.deform.offsets import round_offset, square_offset

__all__ = ["HardwareDeformConv2d"]


class HardwareDeformConv2d(nn.Module):
    r"""Deformable convolution under the constraints of `Huang et al. <https://arxiv.org/abs/2002.08357>`_.

    .. math:: y(p_0) = b + \sum_k w_k\, x(p_0 + p_k + \Delta p_k(p_0)), \qquad |\Delta p_k| \le B

    The constraints may be combined. Offsets are those of a convolution of the sampled map, zero at first.

    Args:
        in_channels, out_channels: of the input and the output.
        kernel_size: pixels along a side, odd.
        depthwise: a 1x1 convolution, then one deformable kernel a channel, instead of a dense deformable kernel.
        square: offsets stretch the kernel by one number a position instead of moving every tap.
        bound: B in pixels, so that a few rows of the map in a buffer are enough; None for no bound.
        rounded: offsets are whole pixels, so that nothing is interpolated; gradients pass straight through.
        stride: pixels between two kernel centres.
        bias: add a number to every output channel.
        device, dtype: of the parameters.

    Shapes:
        - input: :math:`(N, C, H, W)`
        - output: :math:`(N, C', \lceil H / s \rceil, \lceil W / s \rceil)`

    Raises:
        ValueError: if `kernel_size` is even or `bound` is not positive.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        depthwise: bool = False,
        square: bool = False,
        bound: float | None = None,
        rounded: bool = False,
        stride: int = 1,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd: got {kernel_size}")
        if bound is not None and bound <= 0:
            raise ValueError(f"bound must be positive: got {bound}")
        self.kernel_size, self.stride = kernel_size, stride
        self.square, self.bound, self.rounded = square, bound, rounded
        self.pointwise: nn.Module = nn.Identity()
        sampled, depth = in_channels, in_channels
        if depthwise:
            self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False, device=device, dtype=dtype)
            sampled, depth = out_channels, 1
        shape = (out_channels, depth, kernel_size, kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        found = 1 if square else 2 * kernel_size**2
        self.conv_offset = nn.Conv2d(
            sampled, found, kernel_size, stride, kernel_size // 2, device=device, dtype=dtype
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights; offsets start at zero."""
        limit = 1 / math.sqrt(self.weight[0].numel())
        nn.init.uniform_(self.weight, -limit, limit)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -limit, limit)
        if isinstance(self.pointwise, nn.Conv2d):
            self.pointwise.reset_parameters()
        for parameter in self.conv_offset.parameters():
            nn.init.zeros_(parameter)

    def find_offset(self, x: Tensor) -> Tensor:
        """Return the offsets (N, 2 K, H', W') at which the map `x` is sampled."""
        offset = self.conv_offset(x)
        if self.bound is not None:
            # The outermost taps of a square kernel move as many times as far as they stand from its centre.
            bound = self.bound / max(1, self.kernel_size // 2) if self.square else self.bound
            offset = offset.clamp(-bound, bound)
        if self.rounded:
            offset = round_offset(offset)
        return square_offset(offset, self.kernel_size) if self.square else offset

    def forward(self, x: Tensor) -> Tensor:
        """Convolve `x` at the positions found in it."""
        x = self.pointwise(x)
        return deform_conv2d(
            x, self.find_offset(x), self.weight, self.bias, stride=self.stride, padding=self.kernel_size // 2
        )


CASES = (
    Case(
        HardwareDeformConv2d, {"in_channels": 4, "out_channels": 5},
        ((2, 4, 7, 5),), (2, 5, 7, 5), minimal=(1, 4, 1, 1),
        raises=(
            Raises(ValueError, "kernel_size must be odd: got 2", {"kernel_size": 2}),
            Raises(ValueError, "bound must be positive: got 0", {"bound": 0}),
        ),
    ),
    Case(
        HardwareDeformConv2d, {"in_channels": 3, "out_channels": 4, "depthwise": True, "bound": 1.5, "stride": 2},
        ((2, 3, 9, 8),), (2, 4, 5, 4), id="depthwise",
    ),
    Case(
        HardwareDeformConv2d,
        {"in_channels": 3, "out_channels": 4, "kernel_size": 5, "depthwise": True, "square": True, "bias": False},
        ((2, 3, 7, 6),), (2, 4, 7, 6), id="square",
    ),
)  # fmt: skip
