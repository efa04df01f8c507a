"""Convolution and batch norm, which are one convolution when they are deployed."""

import copy

from torch import Tensor, nn

from omniconv.core.cases import Case
from omniconv.layers.conv.reparam import fuse_conv_bn

__all__ = ["ConvNorm2d"]


class ConvNorm2d(nn.Module):
    r"""Convolution without bias and its `batch norm <https://arxiv.org/abs/1502.03167>`_.

    .. math:: y = \mathrm{BN}(W * x)

    Args:
        in_channels, out_channels: channels of input and output.
        kernel_size: k.
        stride: s.
        padding: zeros on every side; half of the kernel by default.
        groups: of the convolution.
        device, dtype: of the parameters.

    Shapes:
        - input: :math:`(N, C_\mathrm{in}, H, W)`
        - output: :math:`(N, C_\mathrm{out}, H', W')` with :math:`H' = \lfloor (H + 2 p - k) / s \rfloor + 1`
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        *,
        stride: int = 1,
        padding: int | None = None,
        groups: int = 1,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        padding = kernel_size // 2 if padding is None else padding
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding,
            groups=groups, bias=False, device=device, dtype=dtype,
        )  # fmt: skip
        self.norm = nn.BatchNorm2d(out_channels, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw new weights and forget the running statistics."""
        self.conv.reset_parameters()
        self.norm.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Return the normed convolution of `x`."""
        return self.norm(self.conv(x))

    def merged(self) -> nn.Conv2d:
        """Return the convolution with bias that equals this layer in eval mode."""
        weight, bias = fuse_conv_bn(self.conv.weight, None, self.norm)
        # Copying the convolution saves naming all of its arguments.
        conv = copy.deepcopy(self.conv)
        conv.weight, conv.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
        return conv


CASES = (
    Case(
        ConvNorm2d,
        {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "stride": 2, "groups": 2},
        inputs=((2, 4, 7, 5),),
        output=(2, 6, 4, 3),
        minimal=(2, 4, 1, 1),
    ),
)
