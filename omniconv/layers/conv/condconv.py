"""Conditionally parameterised convolution: every sample has its own kernel, mixed from those of a few experts.

Paper: Yang et al., CondConv, https://arxiv.org/abs/1904.04971. A mixture of kernels is one convolution, where a mixture
of outputs would be as many as there are experts. Parameter names and shapes are those of the public weights.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.cases import Case, Raises
from omniconv.layers.conv.inverted_residual import InvertedResidual
from omniconv.layers.conv.same import SameConv2d, pad_same

__all__ = ["CondConv2d", "CondConvResidual", "ExpertConv2d", "Routing"]


class Routing(nn.Linear):
    r"""Weights of the experts from the means of the channels.

    .. math:: r(x) = \sigma\Bigl(R\, \frac{1}{HW} \sum_{h,w} x_{hw} + b\Bigr)

    Args:
        in_channels: channels C of the input.
        experts: E.
        device, dtype: of the parameters.

    Shapes:
        - input: :math:`(N, C, H, W)`
        - output: :math:`(N, E)`
    """

    def __init__(self, in_channels: int, experts: int = 4, *, device=None, dtype=None) -> None:
        super().__init__(in_channels, experts, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw small weights, so that every expert starts with about one half."""
        bound = (self.in_features + self.out_features) ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Return the weights."""
        return super().forward(input.mean((2, 3))).sigmoid()


class ExpertConv2d(nn.Module):
    r"""Convolution of every sample with its own mixture of kernels, with the weights given.

    .. math:: y_n = \Bigl(\sum_{e=1}^E r_{ne} W_e\Bigr) * x_n + \sum_{e=1}^E r_{ne} b_e

    All samples run as one convolution with groups, side by side on the channel axis.

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups, bias: as in `torch.nn.Conv2d`, with one
            number for both axes.
        padding: pixels on every side, or "same" for TensorFlow's.
        experts: E.
        device, dtype: of the parameters.

    Shapes:
        - input: :math:`(N, C_\mathrm{in}, H, W)` and the weights r, :math:`(N, E)`
        - output: :math:`(N, C_\mathrm{out}, H', W')`

    Raises:
        ValueError: if `groups` does not divide the channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        experts: int = 4,
        stride: int = 1,
        padding: int | Literal["same"] = 0,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels % groups:
                raise ValueError(f"{name} must be divisible by groups: got {channels} and {groups}")
        self.out_channels, self.kernel_size = out_channels, (kernel_size, kernel_size)
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.kernel_shape = (in_channels // groups, kernel_size, kernel_size)
        size = out_channels * in_channels // groups * kernel_size**2
        self.weight = nn.Parameter(torch.empty(experts, size, device=device, dtype=dtype))
        self.bias = (
            nn.Parameter(torch.empty(experts, out_channels, device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()

    @classmethod
    def like(cls, conv: nn.Conv2d, experts: int) -> "ExpertConv2d":
        """Return experts of the shape of a convolution, with weights of their own."""
        same = isinstance(conv, SameConv2d)
        return cls(
            conv.in_channels, conv.out_channels, conv.kernel_size[0], experts=experts, stride=conv.stride[0],
            padding="same" if same else int(conv.padding[0]), dilation=conv.dilation[0], groups=conv.groups,
            bias=conv.bias is not None, device=conv.weight.device, dtype=conv.weight.dtype,
        )  # fmt: skip

    def reset_parameters(self) -> None:
        """Draw every expert as torch draws a convolution."""
        bound = (self.weight.shape[1] // self.out_channels) ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor, routing: Tensor) -> Tensor:
        """Convolve every sample of `x` with the kernel that its row of `routing` mixes."""
        if self.padding == "same":
            x = pad_same(x, self.dilation * (self.kernel_size[0] - 1) + 1, self.stride)
        samples = x.shape[0]
        y = F.conv2d(
            x.reshape(1, -1, *x.shape[2:]),
            (routing @ self.weight).view(-1, *self.kernel_shape),
            None if self.bias is None else (routing @ self.bias).flatten(),
            self.stride,
            0 if self.padding == "same" else self.padding,
            self.dilation,
            samples * self.groups,
        )
        return y.view(samples, self.out_channels, *y.shape[2:])


class CondConv2d(nn.Module):
    r"""Convolution of `CondConv <https://arxiv.org/abs/1904.04971>`_, whose kernel depends on the sample.

    .. math:: y = \Bigl(\sum_{e=1}^E r_e(x)\, W_e\Bigr) * x

    with :math:`r(x)` of `Routing`. It costs one convolution and the mixing of E kernels.

    Args:
        in_channels, out_channels, kernel_size: as in `ExpertConv2d`.
        experts: E.
        device, dtype: of the parameters.
        **options: stride, padding, dilation, groups and bias, as in `ExpertConv2d`.

    Shapes:
        - input: :math:`(N, C_\mathrm{in}, H, W)`
        - output: :math:`(N, C_\mathrm{out}, H', W')`

    Raises:
        ValueError: if `groups` does not divide the channels.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, experts: int = 4,
        device=None, dtype=None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.routing_fn = Routing(in_channels, experts, **factory)
        self.conv = ExpertConv2d(
            in_channels, out_channels, kernel_size, experts=experts, **options, **factory
        )

    def reset_parameters(self) -> None:
        """Draw new experts and a new routing."""
        self.routing_fn.reset_parameters()
        self.conv.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Convolve every sample of `x` with its own kernel."""
        return self.conv(x, self.routing_fn(x))


class CondConvResidual(InvertedResidual):
    r"""Inverted residual whose three convolutions are mixtures of experts, with one routing for all of them.

    Args:
        in_channels, out_channels: channels of input and output.
        experts: E.
        device, dtype: of the parameters.
        **options: of `InvertedResidual`.

    Shapes:
        - input: :math:`(N, C_\mathrm{in}, H, W)`
        - output: :math:`(N, C_\mathrm{out}, \lceil H / s \rceil, \lceil W / s \rceil)`

    Raises:
        ValueError: if `kernel_size` is even.
    """

    conv_pw: nn.Module
    conv_dw: nn.Module
    conv_pwl: nn.Module

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        experts: int = 4,
        device=None,
        dtype=None,
        **options: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, device=device, dtype=dtype, **options)
        for name in ("conv_pw", "conv_dw", "conv_pwl"):
            self.set_submodule(name, ExpertConv2d.like(getattr(self, name), experts))
        self.routing_fn = Routing(in_channels, experts, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw new weights."""
        super().reset_parameters()
        for module in self.children():
            if isinstance(module, ExpertConv2d | Routing):
                module.reset_parameters()

    def branch(self, x: Tensor) -> Tensor:
        """Return the residual branch."""
        routing = self.routing_fn(x)
        x = self.act(self.bn1(self.conv_pw(x, routing)))
        x = self.se(self.act(self.bn2(self.conv_dw(x, routing))))
        return self.bn3(self.conv_pwl(x, routing))


# Samples side by side on the channel axis are channels-first, so channels-last does not survive.
CASES = (
    Case(Routing, {"in_channels": 6, "experts": 3}, inputs=((2, 6, 7, 5),), output=(2, 3)),
    Case(
        ExpertConv2d,
        {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "experts": 3, "stride": 2, "padding": "same"},
        inputs=((2, 4, 7, 10), (2, 3)),
        output=(2, 6, 4, 5),
        channels_last=False,
        raises=(
            Raises(
                ValueError,
                "out_channels must be divisible by groups: got 6 and 4",
                {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "groups": 4},
            ),
        ),
    ),
    Case(
        CondConv2d,
        {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1, "groups": 2},
        inputs=((2, 4, 7, 5),),
        output=(2, 6, 7, 5),
        minimal=(1, 4, 1, 1),
        channels_last=False,
    ),
    Case(
        CondConvResidual,
        {"in_channels": 8, "out_channels": 8, "experts": 2, "expansion": 2, "se_channels": 2},
        inputs=((2, 8, 7, 5),),
        output=(2, 8, 7, 5),
        minimal=(1, 8, 1, 1),
        channels_last=False,
    ),
)
