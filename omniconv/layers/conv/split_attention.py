"""Split attention: several convolutions of one input, mixed channel by channel by a softmax over all of them.

Paper: Zhang et al., ResNeSt: Split-Attention Networks, https://arxiv.org/abs/2004.08955. The splits lie one after the
other along the channels (radix-major), so that one grouped convolution computes all of them. Parameter names are those
of the public weights.
"""

from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from omniconv.core.cases import Case, Raises

__all__ = ["SplitAttentionConv2d"]


class SplitAttentionConv2d(nn.Module):
    r"""Convolution of `ResNeSt <https://arxiv.org/abs/2004.08955>`_.

    .. math:: y = \sum_{r=1}^{R} a_r \cdot u_r, \qquad a_{rc} = \frac{e^{g_{rc}(z)}}{\sum_{r'} e^{g_{r'c}(z)}}, \qquad
              z = \frac{1}{HW} \sum_{h,w} \sum_{r} u_{r,hw}

    where :math:`u_r` are the R splits of a convolution with K R groups, batch norm and ReLU, and g is a bottleneck of
    two 1x1 convolutions with K groups. A single split has a sigmoid for its softmax.

    Args:
        in_channels: of the input.
        out_channels: C, of the output.
        kernel_size: odd.
        stride: of the convolution.
        groups: K, the cardinality.
        radix: R, splits.
        device, dtype: of the parameters.

    Shapes:
        - input: :math:`(N, C_\mathrm{in}, H, W)`
        - output: :math:`(N, C, \lceil H / s \rceil, \lceil W / s \rceil)`

    Raises:
        ValueError: if `groups` times `radix` does not divide `in_channels`, or `groups` does not `out_channels`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        *,
        groups: int = 1,
        radix: int = 2,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if in_channels % (groups * radix) or out_channels % groups:
            raise ValueError(
                "groups * radix must divide in_channels, and groups out_channels: "
                f"got {groups} * {radix}, {in_channels} and {out_channels}"
            )
        self.radix, self.cardinality = radix, groups
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        wide, reduced = out_channels * radix, max(32, in_channels * radix // 4)
        self.conv = nn.Conv2d(
            in_channels,
            wide,
            kernel_size,
            stride,
            kernel_size // 2,
            groups=groups * radix,
            bias=False,
            **factory,
        )
        self.bn0 = nn.BatchNorm2d(wide, **factory)
        self.act = nn.ReLU(inplace=True)
        self.fc1 = nn.Conv2d(out_channels, reduced, 1, groups=groups, **factory)
        self.bn1 = nn.BatchNorm2d(reduced, **factory)
        self.fc2 = nn.Conv2d(reduced, wide, 1, groups=groups, **factory)

    def reset_parameters(self) -> None:
        """Draw new weights."""
        for layer in (self.conv, self.bn0, self.fc1, self.bn1, self.fc2):
            layer.reset_parameters()

    def attention(self, z: Tensor) -> Tensor:
        """Return the weights (N, R, C, 1, 1) of the splits, whose sum has the means z (N, C, 1, 1)."""
        scores = self.fc2(self.act(self.bn1(self.fc1(z))))
        # A group of fc2 puts out its share of the channels of every split.
        scores = scores.unflatten(1, (self.cardinality, self.radix, -1)).transpose(1, 2)
        weights = scores.softmax(1) if self.radix > 1 else scores.sigmoid()
        return weights.flatten(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve `x` and mix the splits."""
        splits = self.act(self.bn0(self.conv(x))).chunk(self.radix, 1)
        z = reduce(torch.add, splits).mean((2, 3), keepdim=True)
        return reduce(torch.add, map(torch.mul, splits, self.attention(z).unbind(1)))


CASES = (
    Case(
        SplitAttentionConv2d,
        {"in_channels": 8, "out_channels": 6, "groups": 2},
        inputs=((2, 8, 7, 5),),
        output=(2, 6, 7, 5),
        minimal=(1, 8, 1, 1),
        raises=(
            Raises(
                ValueError,
                "groups * radix must divide in_channels, and groups out_channels: got 2 * 3, 8 and 6",
                {"radix": 3},
            ),
        ),
    ),
    Case(
        SplitAttentionConv2d,
        {"in_channels": 4, "out_channels": 8, "stride": 2, "groups": 4, "radix": 1},
        inputs=((2, 4, 7, 6),),
        output=(2, 8, 4, 3),
        id="one",
        minimal=(1, 4, 1, 1),
    ),
)
