"""TensorFlow's SAME padding: ceil(size / stride) pixels out, and an odd pixel of padding goes to the end.

With a stride, PyTorch's symmetric padding samples other pixels, so weights trained under SAME need it.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.cases import Case, Raises

__all__ = ["SameConv2d", "pad_same"]


def pad_same(x: Tensor, extent: int, stride: int) -> Tensor:
    """Return `x` with the zeros around it that a kernel of `extent` pixels and a stride need."""
    height, width = x.shape[2:]
    pad_h = extent - 1 - (height - 1) % stride
    pad_w = extent - 1 - (width - 1) % stride
    return F.pad(x, (pad_w // 2, pad_w - pad_w // 2, pad_h // 2, pad_h - pad_h // 2))


class SameConv2d(nn.Conv2d):
    r"""2-D convolution whose output has :math:`\lceil H / s \rceil \times \lceil W / s \rceil` pixels.

    An axis of size :math:`n` gets :math:`p = d (k - 1) - (n - 1) \bmod s` zeros, half of them in front,
    rounded down.

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups, bias: as in `torch.nn.Conv2d`, with
            one number for both axes.
        device, dtype: of the parameters.

    Shapes:
        - input: :math:`(N, C_\mathrm{in}, H, W)`
        - output: :math:`(N, C_\mathrm{out}, \lceil H / s \rceil, \lceil W / s \rceil)`

    Raises:
        ValueError: if the stride is larger than the kernel's extent, so that pixels would be skipped.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        *,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        extent = dilation * (kernel_size - 1) + 1
        if stride > extent:
            raise ValueError(
                f"stride must not exceed the kernel's extent: got stride {stride} and extent {extent}"
            )
        super().__init__(
            in_channels, out_channels, kernel_size, stride,
            dilation=dilation, groups=groups, bias=bias, device=device, dtype=dtype,
        )  # fmt: skip
        self.extent = extent

    def pad(self, x: Tensor) -> Tensor:
        """Return `x` with its padding."""
        return pad_same(x, self.extent, self.stride[0])

    def forward(self, input: Tensor) -> Tensor:
        """Pad `input` and convolve it."""
        return super().forward(self.pad(input))


CASES = (
    Case(
        SameConv2d,
        {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "stride": 2},
        inputs=((2, 4, 7, 10),),
        output=(2, 6, 4, 5),
        minimal=(1, 4, 1, 1),
        raises=(
            Raises(
                ValueError,
                "stride must not exceed the kernel's extent: got stride 2 and extent 1",
                {"in_channels": 4, "out_channels": 6, "kernel_size": 1, "stride": 2},
            ),
        ),
    ),
)
