"""Convolution at positions that a second convolution finds: DCNv1 and DCNv2.

Papers: Dai et al., Deformable Convolutional Networks, https://arxiv.org/abs/1703.06211; Zhu et al., Deformable ConvNets
v2, https://arxiv.org/abs/1811.11168. Versions 3 and 4, without a dense kernel, are in `dcn`.
"""

import math

import torch
from torch import Tensor, nn

from omniconv.core.cases import Case, Raises
from omniconv.ops.deform.api import deform_conv2d

__all__ = ["DeformConv2d"]


class DeformConv2d(nn.Module):
    r"""Convolution at positions that a second convolution finds: `DCNv2 <https://arxiv.org/abs/1811.11168>`_.

    .. math:: y(p_0) = b + \sum_k w_k\, \sigma(m_k(p_0))\, x(p_0 + p_k + \Delta p_k(p_0)),
        \qquad (\Delta p, m) = w' * x + b'

    Without modulation, m is absent and it is DCNv1. It starts as an ordinary convolution, halved by the masks if there
    are any.

    Args:
        in_channels, out_channels: of the input and the output.
        kernel_size: pixels along a side.
        stride, padding, dilation: as in `nn.Conv2d`.
        groups: parts into which the channels fall.
        offset_groups: G, groups of channels with offsets of their own.
        modulated: find masks as well.
        bias: add a number to every output channel.
        device, dtype: of the parameters.

    Shapes:
        - input: :math:`(N, C, H, W)`
        - output: :math:`(N, C', H', W')`

    Raises:
        ValueError: if the groups do not divide the channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        offset_groups: int = 1,
        modulated: bool = True,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if in_channels % groups or out_channels % groups or in_channels % offset_groups:
            raise ValueError(
                f"groups must divide the channels: got {in_channels} and {out_channels} channels, "
                f"{groups} groups and {offset_groups} offset_groups"
            )
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.offsets = 2 * offset_groups * kernel_size**2
        shape = (out_channels, in_channels // groups, kernel_size, kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        found = self.offsets * 3 // 2 if modulated else self.offsets
        self.conv_offset = nn.Conv2d(
            in_channels, found, kernel_size, stride, padding, dilation, device=device, dtype=dtype
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights; offsets and masks start at zero."""
        bound = 1 / math.sqrt(self.weight[0].numel())
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        nn.init.zeros_(self.conv_offset.weight)
        if self.conv_offset.bias is not None:
            nn.init.zeros_(self.conv_offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve `x` at the positions found in it."""
        found = self.conv_offset(x)
        offset, mask = found[:, : self.offsets], found[:, self.offsets :].sigmoid()
        return deform_conv2d(
            x, offset, self.weight, self.bias, mask if mask.shape[1] else None,
            stride=self.stride, padding=self.padding, dilation=self.dilation,
        )  # fmt: skip


CASES = (
    Case(
        DeformConv2d, {"in_channels": 4, "out_channels": 6, "padding": 1, "offset_groups": 2},
        ((2, 4, 7, 5),), (2, 6, 7, 5), minimal=(1, 4, 1, 1),
        raises=(
            Raises(
                ValueError,
                "groups must divide the channels: got 4 and 6 channels, 3 groups and 2 offset_groups",
                {"groups": 3},
            ),
        ),
    ),
    Case(
        DeformConv2d,
        {
            "in_channels": 4, "out_channels": 4, "kernel_size": 2, "stride": 2, "groups": 4, "modulated": False,
            "bias": False,
        },
        ((2, 4, 9, 8),), (2, 4, 4, 4), id="v1",
    ),
)  # fmt: skip
