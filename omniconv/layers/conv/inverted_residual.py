"""Inverted residuals: expand to many channels, convolve each by itself, project linearly back to few.

Paper: Sandler et al., MobileNetV2, https://arxiv.org/abs/1801.04381. With a squeeze-and-excitation gate
before the projection, the block is the MBConv of EfficientNet, https://arxiv.org/abs/1905.11946. Parameter
names are those of the public weights.
"""

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn

from omniconv.core.cases import Case, Raises
from omniconv.layers.attention.se import SqueezeExcite
from omniconv.layers.conv.same import SameConv2d
from omniconv.layers.drop_path import DropPath

__all__ = ["DepthwiseSeparable", "InvertedResidual", "make_conv", "round_channels"]

Padding = Literal["symmetric", "same"]


def round_channels(channels: float, divisor: int = 8) -> int:
    """Return the multiple of `divisor` nearest to `channels`, but not below 90% of it, and not 0."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * channels else rounded + divisor


def make_conv(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, *, groups: int = 1,
    padding: Padding = "symmetric", device=None, dtype=None,
) -> nn.Conv2d:  # fmt: skip
    """Return a convolution without bias that keeps ceil(size / stride) pixels under either padding."""
    factory: dict[str, Any] = {"groups": groups, "bias": False, "device": device, "dtype": dtype}
    # Without a stride both paddings are the same, and plain convolutions are what every tool knows.
    if padding == "same" and stride > 1:
        return SameConv2d(in_channels, out_channels, kernel_size, stride, **factory)
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, **factory)


def make_gate(
    channels: int, se_channels: int, act: type[nn.Module], gate: type[nn.Module], **factory
) -> nn.Module:
    """Return the gate of a block; an identity if `se_channels` is 0."""
    if not se_channels:
        return nn.Identity()
    names = ("conv_reduce", "conv_expand")
    return SqueezeExcite(channels, se_channels, act=act, gate=gate, names=names, **factory)


class _Block(nn.Module):
    """What both blocks share: the shortcut, and where it is."""

    has_skip: bool
    drop_path: DropPath

    def branch(self, x: Tensor) -> Tensor:
        """Return the residual branch."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y = self.branch(x)
        return x + self.drop_path(y) if self.has_skip else y

    def reset_parameters(self) -> None:
        """Draw new weights."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
                module.reset_parameters()


class InvertedResidual(_Block):
    r"""Inverted residual with linear bottleneck of `MobileNetV2 <https://arxiv.org/abs/1801.04381>`_.

    .. math:: y = x + P\, s(\delta(D\, \delta(E x)))

    with a 1x1 expansion E, a depthwise convolution D, an optional channel gate s and a 1x1 projection P, each
    convolution followed by a norm. The shortcut is there when stride is 1 and the channels agree.

    Args:
        in_channels, out_channels: channels of input and output.
        expansion: t; the block is :math:`t C_\mathrm{in}` channels wide inside, rounded to a multiple of 8.
        kernel_size: of the depthwise convolution, odd.
        stride: of the depthwise convolution.
        se_channels: bottleneck width of the squeeze-and-excitation gate; 0 for none.
        act: the activation :math:`\delta`, made with `inplace=True`; also that inside the gate.
        gate: what maps to the gate's scale.
        norm: makes a norm over a number of channels.
        padding: "symmetric", or TensorFlow's "same".
        drop_path: probability with which a sample's branch is dropped in training.
        device, dtype: of the parameters.

    Shapes:
        - input: :math:`(N, C_\mathrm{in}, H, W)`
        - output: :math:`(N, C_\mathrm{out}, \lceil H / s \rceil, \lceil W / s \rceil)`

    Raises:
        ValueError: if `kernel_size` is even.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        expansion: float = 6,
        kernel_size: int = 3,
        stride: int = 1,
        se_channels: int = 0,
        act: type[nn.Module] = nn.ReLU6,
        gate: type[nn.Module] = nn.Sigmoid,
        norm: Callable[..., nn.Module] = nn.BatchNorm2d,
        padding: Padding = "symmetric",
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        _require_odd(kernel_size)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden = round_channels(in_channels * expansion)
        self.has_skip = stride == 1 and in_channels == out_channels
        self.conv_pw = make_conv(in_channels, hidden, 1, **factory)
        self.bn1 = norm(hidden, **factory)
        self.conv_dw = make_conv(
            hidden, hidden, kernel_size, stride, groups=hidden, padding=padding, **factory
        )
        self.bn2 = norm(hidden, **factory)
        self.se = make_gate(hidden, se_channels, act, gate, **factory)
        self.conv_pwl = make_conv(hidden, out_channels, 1, **factory)
        self.bn3 = norm(out_channels, **factory)
        self.act = act(inplace=True)
        self.drop_path = DropPath(drop_path)

    def branch(self, x: Tensor) -> Tensor:
        """Return the residual branch."""
        x = self.act(self.bn1(self.conv_pw(x)))
        x = self.se(self.act(self.bn2(self.conv_dw(x))))
        return self.bn3(self.conv_pwl(x))


class DepthwiseSeparable(_Block):
    r"""The inverted residual without expansion (t = 1): a depthwise convolution and a linear 1x1 projection.

    .. math:: y = x + P\, s(\delta(D x))

    Args:
        in_channels, out_channels: as in `InvertedResidual`.
        kernel_size, stride, se_channels, act, gate, norm, padding, drop_path: as in `InvertedResidual`.
        device, dtype: of the parameters.

    Shapes:
        - input: :math:`(N, C_\mathrm{in}, H, W)`
        - output: :math:`(N, C_\mathrm{out}, \lceil H / s \rceil, \lceil W / s \rceil)`

    Raises:
        ValueError: if `kernel_size` is even.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int = 3,
        stride: int = 1,
        se_channels: int = 0,
        act: type[nn.Module] = nn.ReLU6,
        gate: type[nn.Module] = nn.Sigmoid,
        norm: Callable[..., nn.Module] = nn.BatchNorm2d,
        padding: Padding = "symmetric",
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        _require_odd(kernel_size)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.has_skip = stride == 1 and in_channels == out_channels
        self.conv_dw = make_conv(
            in_channels, in_channels, kernel_size, stride, groups=in_channels, padding=padding, **factory
        )
        self.bn1 = norm(in_channels, **factory)
        self.se = make_gate(in_channels, se_channels, act, gate, **factory)
        self.conv_pw = make_conv(in_channels, out_channels, 1, **factory)
        self.bn2 = norm(out_channels, **factory)
        self.act = act(inplace=True)
        self.drop_path = DropPath(drop_path)

    def branch(self, x: Tensor) -> Tensor:
        """Return the residual branch."""
        x = self.se(self.act(self.bn1(self.conv_dw(x))))
        return self.bn2(self.conv_pw(x))


def _require_odd(kernel_size: int) -> None:
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and positive: got {kernel_size}")


CASES = (
    Case(
        InvertedResidual,
        {"in_channels": 8, "out_channels": 8, "expansion": 2},
        inputs=((2, 8, 7, 5),),
        output=(2, 8, 7, 5),
        id="skip",
        minimal=(1, 8, 1, 1),
        raises=(
            Raises(
                ValueError,
                "kernel_size must be odd and positive: got 4",
                {"in_channels": 8, "out_channels": 8, "kernel_size": 4},
            ),
        ),
    ),
    Case(
        InvertedResidual,
        {
            "in_channels": 8, "out_channels": 12, "expansion": 2, "kernel_size": 5, "stride": 2,
            "se_channels": 2, "act": nn.SiLU, "padding": "same", "drop_path": 0.2,
        },
        inputs=((2, 8, 7, 10),),
        output=(2, 12, 4, 5),
        id="mbconv",
        minimal=(1, 8, 1, 1),
    ),
    Case(
        DepthwiseSeparable,
        {"in_channels": 8, "out_channels": 12, "stride": 2, "se_channels": 2},
        inputs=((2, 8, 7, 10),),
        output=(2, 12, 4, 5),
        minimal=(1, 8, 1, 1),
    ),
)  # fmt: skip
