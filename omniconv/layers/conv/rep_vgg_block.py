"""RepVGG's block: three branches while it trains, one 3x3 convolution when it is deployed.

Paper: Ding et al., RepVGG, https://arxiv.org/abs/2101.03697. All branches are linear in eval mode, so their
sum is a convolution. Parameter names are those of the public weights.
"""

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.cases import Case, Raises
from omniconv.layers.conv.reparam import fuse_conv_bn

__all__ = ["RepVGGBlock"]


class _ConvNorm(nn.Module):
    """A convolution without bias and its batch norm."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int, groups: int, device, dtype
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"groups": groups, "bias": False, "device": device, "dtype": dtype}
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, **factory)
        self.bn = nn.BatchNorm2d(out_channels, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        if conv.kernel_size == (1, 1) and conv.stride != (1, 1):
            # The same numbers. oneDNN's weight gradient of a strided 1x1 convolution of fewer than 16
            # channels in channels-last writes beyond its memory (torch 2.13, AVX-512, one thread).
            x = x[:, :, :: conv.stride[0], :: conv.stride[1]]
            return self.bn(F.conv2d(x, conv.weight, groups=conv.groups))
        return self.bn(conv(x))


class RepVGGBlock(nn.Module):
    r"""Re-parameterizable block of `RepVGG <https://arxiv.org/abs/2101.03697>`_.

    .. math:: y = \delta\bigl(a(\mathrm{BN}_3(W_3 * x) + \mathrm{BN}_1(W_1 * x) + \mathrm{BN}_0(x))\bigr)

    with a k x k and a 1x1 convolution. The last branch is there when stride is 1 and the channels agree.

    Args:
        in_channels, out_channels: channels of input and output.
        kernel_size: of the larger convolution, odd.
        stride: of both convolutions.
        groups: of both convolutions.
        attn: a channel gate a between the sum and the activation; none by default.
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
        groups: int = 1,
        attn: nn.Module | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive: got {kernel_size}")
        same_shape = stride == 1 and in_channels == out_channels
        self.identity = nn.BatchNorm2d(out_channels, device=device, dtype=dtype) if same_shape else None
        self.conv_kxk = _ConvNorm(in_channels, out_channels, kernel_size, stride, groups, device, dtype)
        self.conv_1x1 = _ConvNorm(in_channels, out_channels, 1, stride, groups, device, dtype)
        self.attn = nn.Identity() if attn is None else attn
        self.act = nn.ReLU(inplace=True)

    def reset_parameters(self) -> None:
        """Draw new weights."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
                module.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y = self.conv_kxk(x) + self.conv_1x1(x)
        if self.identity is not None:
            y = y + self.identity(x)
        return self.act(self.attn(y))

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """Return the convolution (with its gate) and activation that equal this block in eval mode."""
        large = self.conv_kxk.conv
        weight, bias = fuse_conv_bn(large.weight, None, self.conv_kxk.bn)
        border = large.kernel_size[0] // 2
        branches = [(self.conv_1x1.conv.weight, self.conv_1x1.bn)]
        if self.identity is not None:
            # The identity as a 1x1 convolution: within its group, each channel sees itself alone.
            per_group = large.in_channels // large.groups
            eye = torch.eye(per_group, dtype=weight.dtype, device=weight.device).repeat(large.groups, 1)
            branches.append((eye[:, :, None, None], self.identity))
        for kernel, norm in branches:
            kernel, shift = fuse_conv_bn(kernel, None, norm)
            weight, bias = weight + F.pad(kernel, (border,) * 4), bias + shift
        # The same convolution with a bias; copying it first saves naming all of its arguments.
        conv = copy.deepcopy(large)
        conv.weight = nn.Parameter(weight)
        conv.bias = nn.Parameter(bias)
        parts: OrderedDict[str, nn.Module] = OrderedDict(reparam_conv=conv)
        if not isinstance(self.attn, nn.Identity):
            parts["attn"] = copy.deepcopy(self.attn)
        parts["act"] = self.act
        return nn.Sequential(parts).train(self.training)


CASES = (
    Case(
        RepVGGBlock,
        {"in_channels": 8, "out_channels": 8, "groups": 2},
        inputs=((2, 8, 7, 5),),
        output=(2, 8, 7, 5),
        id="three-branches",
        minimal=(1, 8, 1, 1),
        raises=(
            Raises(
                ValueError,
                "kernel_size must be odd and positive: got 2",
                {"in_channels": 8, "out_channels": 8, "kernel_size": 2},
            ),
        ),
    ),
    Case(
        RepVGGBlock,
        {"in_channels": 4, "out_channels": 6, "stride": 2},
        inputs=((2, 4, 7, 10),),
        output=(2, 6, 4, 5),
        id="stride",
        minimal=(1, 4, 1, 1),
    ),
)
