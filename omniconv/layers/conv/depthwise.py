"""Depthwise convolution layers whose training step is fast; `omniconv.accelerate` gives them to a whole network."""

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.cases import Case
from omniconv.ops.depthwise_conv.api import depthwise_conv

__all__ = ["DepthwiseConv1d", "DepthwiseConv2d", "DepthwiseConv3d"]

Sizes = int | Sequence[int]


class _DepthwiseConv(nn.Module):
    """What the layers share: the constructor, and the operator in place of torch's convolution."""

    def __init__(
        self,
        channels: int,
        kernel_size: Sizes,
        *,
        multiplier: int = 1,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device=None,
        dtype=None,
    ) -> None:
        # The next class in line is the layer of torch.
        cast(Any, super()).__init__(
            channels, channels * multiplier, kernel_size, stride, padding, dilation, channels, bias,
            padding_mode, device, dtype,
        )  # fmt: skip

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        layer = cast(nn.Conv2d, self)
        padding = layer.padding
        if layer.padding_mode != "zeros":
            sides = cast(list[int], layer._reversed_padding_repeated_twice)
            input, padding = F.pad(input, sides, mode=layer.padding_mode), 0
        single = input.ndim < weight.ndim
        y = depthwise_conv(
            input[None] if single else input,
            weight,
            bias,
            stride=layer.stride,
            padding=padding,
            dilation=layer.dilation,
        )
        return y[0] if single else y


class DepthwiseConv1d(_DepthwiseConv, nn.Conv1d):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Depthwise `nn.Conv1d` for :math:`(N, C, L)`, with the arguments of `DepthwiseConv2d`."""


class DepthwiseConv2d(_DepthwiseConv, nn.Conv2d):  # pyright: ignore[reportIncompatibleMethodOverride]
    r"""Convolution of every channel with kernels of its own, as `nn.Conv2d` with `groups=channels`, faster in training.

    .. math:: y_{n,c,i} = b_c + \sum_u w_{c,u}\, x_{n, \lfloor c / m \rfloor, s i + d u - p}

    It is an `nn.Conv2d`, with its state-dict keys, attributes and outputs.

    Args:
        channels: of the input.
        kernel_size: taps, one number or one for every axis.
        multiplier: m, kernels for every channel.
        stride: s.
        padding: p, pixels on both sides of every axis, or "same" or "valid".
        dilation: d.
        bias: add a number to every output channel.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        device, dtype: of the parameters.

    Shapes:
        - input: :math:`(N, C, H, W)` or :math:`(C, H, W)`
        - output: :math:`(N, m C, H', W')` or :math:`(m C, H', W')`

    Raises:
        ValueError: if the sizes do not fit together.
    """


class DepthwiseConv3d(_DepthwiseConv, nn.Conv3d):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Depthwise `nn.Conv3d` for :math:`(N, C, D, H, W)`, with the arguments of `DepthwiseConv2d`."""


CASES = (
    Case(DepthwiseConv1d, {"channels": 5, "kernel_size": 7, "padding": 3}, ((2, 5, 19),), (2, 5, 19), vary=(0, 2)),
    Case(
        DepthwiseConv1d, {"channels": 4, "kernel_size": 3, "dilation": 4, "padding": "same", "bias": False},
        ((3, 4, 13),), (3, 4, 13), id="dilated", vary=(0, 2),
    ),
    Case(DepthwiseConv2d, {"channels": 6, "kernel_size": 5, "padding": 2}, ((2, 6, 9, 7),), (2, 6, 9, 7)),
    Case(
        DepthwiseConv2d, {"channels": 3, "kernel_size": (3, 5), "multiplier": 2, "stride": 2, "padding": (1, 2)},
        ((2, 3, 11, 8),), (2, 6, 6, 4), id="multiplier",
    ),
    Case(
        DepthwiseConv2d, {"channels": 3, "kernel_size": 3, "padding": 1, "padding_mode": "circular"},
        ((2, 3, 9, 7),), (2, 3, 9, 7), id="circular", channels_last=False,  # torch pads into channels-first
    ),
    Case(
        DepthwiseConv3d, {"channels": 4, "kernel_size": 3, "padding": 1}, ((2, 4, 5, 7, 6),), (2, 4, 5, 7, 6),
        vary=(0, 2, 3, 4),
    ),
)  # fmt: skip
