"""Re-parameterizable depthwise convolution: a large kernel trained beside a small one, deployed as one."""

from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.cases import Case, Raises
from omniconv.layers.conv.conv_norm import ConvNorm2d

__all__ = ["RepDepthwiseConv2d"]


class RepDepthwiseConv2d(nn.Module):
    r"""Depthwise convolution with a parallel small kernel, as `RepLKNet <https://arxiv.org/abs/2203.06717>`_ has it.

    .. math:: y = \mathrm{BN}_0(W * x) + \mathrm{BN}_1(w * x)

    Args:
        in_channels: channels C.
        kernel_size: of W, odd.
        small_size: of w, odd and no larger.
        multiplier: m, kernels for every channel.
        stride: s.
        device, dtype: of the parameters.

    Shapes:
        - input: :math:`(N, C, H, W)`
        - output: :math:`(N, m C, \lceil H / s \rceil, \lceil W / s \rceil)`

    Raises:
        ValueError: if a kernel size is even, or the small one is larger.
    """

    def __init__(
        self,
        in_channels: int,
        kernel_size: int = 7,
        small_size: int = 3,
        *,
        multiplier: int = 1,
        stride: int = 1,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0 or small_size % 2 == 0 or not 1 <= small_size <= kernel_size:
            raise ValueError(
                f"kernel_size and small_size must be odd, the second no larger: got {kernel_size} and {small_size}"
            )

        def branch(size: int) -> ConvNorm2d:
            return ConvNorm2d(
                in_channels, multiplier * in_channels, size,
                stride=stride, groups=in_channels, device=device, dtype=dtype,
            )  # fmt: skip

        self.large = branch(kernel_size)
        self.small = branch(small_size)

    def reset_parameters(self) -> None:
        """Draw new weights and forget the running statistics."""
        self.large.reset_parameters()
        self.small.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of both branches."""
        return self.large(x) + self.small(x)

    def merged(self) -> nn.Conv2d:
        """Return the depthwise convolution with bias that equals this layer in eval mode."""
        conv, small = self.large.merged(), self.small.merged()
        assert conv.bias is not None
        assert small.bias is not None
        margin = (conv.kernel_size[0] - small.kernel_size[0]) // 2
        conv.weight = nn.Parameter((conv.weight + F.pad(small.weight, (margin,) * 4)).detach())
        conv.bias = nn.Parameter((conv.bias + small.bias).detach())
        return conv


CASES = (
    Case(
        RepDepthwiseConv2d,
        {"in_channels": 4},
        inputs=((2, 4, 9, 5),),
        output=(2, 4, 9, 5),
        minimal=(2, 4, 1, 1),
        raises=(
            Raises(
                ValueError,
                "kernel_size and small_size must be odd, the second no larger: got 3 and 5",
                {"in_channels": 4, "kernel_size": 3, "small_size": 5},
            ),
        ),
    ),
    Case(
        RepDepthwiseConv2d,
        {"in_channels": 3, "kernel_size": 5, "small_size": 1, "multiplier": 2, "stride": 2},
        inputs=((2, 3, 9, 6),),
        output=(2, 6, 5, 3),
        id="stride",
        minimal=(2, 3, 1, 1),
    ),
)
