"""From Inception to Xception: convolutions that treat channels and places apart, wholly or by segments.

Paper: Chollet, Xception: Deep Learning with Depthwise Separable Convolutions, https://arxiv.org/abs/1610.02357. The
paper reads an Inception block as a 1x1 convolution whose channels are split into a few segments, each convolved by
itself (`SegmentedConv2d`); with as many segments as channels it is "extreme", and a depthwise separable convolution
(`SeparableConv2d`) but for the order of its two steps.
"""

from typing import Any

from torch import Tensor, nn

from omniconv.core.cases import Case, Raises
from omniconv.layers.conv.inverted_residual import Padding, make_conv

__all__ = ["SegmentedConv2d", "SeparableConv2d"]


class SeparableConv2d(nn.Module):
    r"""Depthwise separable convolution of `Xception <https://arxiv.org/abs/1610.02357>`_.

    .. math:: y_o = \sum_c p_{oc}\, \delta(d_c * x_c)

    Args:
        in_channels, out_channels: channels of input and output.
        kernel_size: of the depthwise kernels d, odd.
        stride: of the depthwise convolution.
        act: the activation :math:`\delta`, which the paper finds harmful; None for none.
        padding: "symmetric", or TensorFlow's "same".
        names: what the two convolutions are called in the state dict, about which public weights do not agree.
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
        kernel_size: int = 3,
        stride: int = 1,
        *,
        act: type[nn.Module] | None = None,
        padding: Padding = "symmetric",
        names: tuple[str, str] = ("depthwise", "pointwise"),
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive: got {kernel_size}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        depthwise = make_conv(
            in_channels, in_channels, kernel_size, stride, groups=in_channels, padding=padding, **factory
        )
        self.names = names
        self.add_module(names[0], depthwise)
        self.act = act() if act else nn.Identity()
        self.add_module(names[1], make_conv(in_channels, out_channels, 1, **factory))

    def reset_parameters(self) -> None:
        """Draw new weights."""
        for name in self.names:
            module = self.get_submodule(name)
            assert isinstance(module, nn.Conv2d)
            module.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Convolve every channel by itself, then mix the channels of every pixel."""
        depthwise, pointwise = (self.get_submodule(name) for name in self.names)
        return pointwise(self.act(depthwise(x)))


class SegmentedConv2d(nn.Module):
    r"""Simplified Inception block of `Xception <https://arxiv.org/abs/1610.02357>`_, figures 2 to 4.

    .. math:: y = [k_1 * z_1, \ldots, k_S * z_S], \qquad z = P x

    where :math:`z_1, \ldots, z_S` are segments of z's channels. One segment is a regular convolution after a 1x1
    one; one segment a channel is the extreme form.

    Args:
        in_channels, out_channels: channels of input and output.
        segments: S, a divisor of `out_channels`.
        kernel_size: of the kernels k, odd.
        device, dtype: of the parameters.

    Shapes:
        - input: :math:`(N, C_\mathrm{in}, H, W)`
        - output: :math:`(N, C_\mathrm{out}, H, W)`

    Raises:
        ValueError: if `segments` does not divide `out_channels`, or `kernel_size` is even.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        segments: int,
        kernel_size: int = 3,
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive: got {kernel_size}")
        if segments < 1 or out_channels % segments:
            raise ValueError(f"segments must divide out_channels: got {segments} and {out_channels}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.pointwise = make_conv(in_channels, out_channels, 1, **factory)
        self.spatial = make_conv(out_channels, out_channels, kernel_size, groups=segments, **factory)

    def reset_parameters(self) -> None:
        """Draw new weights."""
        self.pointwise.reset_parameters()
        self.spatial.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Mix the channels of every pixel, then convolve every segment by itself."""
        return self.spatial(self.pointwise(x))


CASES = (
    Case(
        SeparableConv2d,
        {"in_channels": 6, "out_channels": 9, "act": nn.ELU},
        inputs=((2, 6, 7, 5),),
        output=(2, 9, 7, 5),
        minimal=(1, 6, 1, 1),
        raises=(
            Raises(
                ValueError,
                "kernel_size must be odd and positive: got 4",
                {"in_channels": 6, "out_channels": 9, "kernel_size": 4},
            ),
        ),
    ),
    Case(
        SeparableConv2d,
        {"in_channels": 6, "out_channels": 4, "kernel_size": 5, "stride": 2, "padding": "same"},
        inputs=((2, 6, 7, 10),),
        output=(2, 4, 4, 5),
        id="strided",
        minimal=(1, 6, 1, 1),
    ),
    Case(
        SegmentedConv2d,
        {"in_channels": 6, "out_channels": 9, "segments": 3},
        inputs=((2, 6, 7, 5),),
        output=(2, 9, 7, 5),
        minimal=(1, 6, 1, 1),
        raises=(
            Raises(
                ValueError,
                "segments must divide out_channels: got 4 and 9",
                {"in_channels": 6, "out_channels": 9, "segments": 4},
            ),
            Raises(
                ValueError,
                "kernel_size must be odd and positive: got 2",
                {"in_channels": 6, "out_channels": 9, "segments": 3, "kernel_size": 2},
            ),
        ),
    ),
)
