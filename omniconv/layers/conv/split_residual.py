"""An inverted residual computed slice by slice, so that its wide inner map is never in memory as a whole.

Paper: Sandler et al., MobileNetV2, section 5.1, https://arxiv.org/abs/1801.04381.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.layers.conv.inverted_residual import InvertedResidual
from omniconv.layers.conv.same import SameConv2d

__all__ = ["split_forward"]


def split_forward(block: InvertedResidual, x: Tensor, parts: int) -> Tensor:
    r"""Run a block in eval mode on `parts` slices of its inner channels, one after the other.

    .. math:: F(x) = \sum_{i=1}^{p} P_i\, \delta(D_i\, \delta(E_i x))

    No more than one slice of the wide inner map is alive at a time (section 5.1 of the paper), for the same
    multiply-adds.

    Args:
        block: in eval mode, without a gate, which would need all channels at once; its norms are batch norms.
        x: (N, C, H, W).
        parts: slices; must divide the block's inner channels.

    Raises:
        ValueError: if the block is in training mode or has a gate, or `parts` does not divide its channels.
    """
    hidden = block.conv_dw.out_channels
    if block.training or not isinstance(block.se, nn.Identity):
        raise ValueError("split_forward needs a block in eval mode and without a squeeze-and-excitation gate")
    if parts < 1 or hidden % parts:
        raise ValueError(f"parts must divide the inner channels: got {parts} and {hidden}")
    size = hidden // parts
    depthwise = block.conv_dw

    def norm_act(y: Tensor, bn: nn.Module, part: slice) -> Tensor:
        assert isinstance(bn, nn.BatchNorm2d)
        mean, var = bn.get_buffer("running_mean")[part], bn.get_buffer("running_var")[part]
        weight, bias = bn.get_parameter("weight")[part], bn.get_parameter("bias")[part]
        scale = weight * (var + bn.eps).rsqrt()
        return block.act(torch.addcmul((bias - mean * scale)[:, None, None], y, scale[:, None, None]))

    total = x.new_zeros(())
    for start in range(0, hidden, size):
        part = slice(start, start + size)
        y = norm_act(F.conv2d(x, block.conv_pw.weight[part]), block.bn1, part)
        y = depthwise.pad(y) if isinstance(depthwise, SameConv2d) else y
        y = F.conv2d(y, depthwise.weight[part], None, depthwise.stride, depthwise.padding, groups=size)
        total = total + F.conv2d(norm_act(y, block.bn2, part), block.conv_pwl.weight[:, part])
    y: Tensor = block.bn3(total)
    return x + y if block.has_skip else y
