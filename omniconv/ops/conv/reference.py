"""Convolution as its equation reads: one product of channels for every tap of the kernel."""

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from omniconv.ops.conv._torch import output_size

__all__ = ["reference"]


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    r"""Return the convolution of a prepared call, tap by tap.

    .. math:: y_{n,o,i} = b_o + \sum_{c,u} w_{o,c,u}\, x_{n, c, s i + d u - p}
    """
    sizes = output_size(x, weight, stride, padding, dilation)
    x = F.pad(x, [amount for p in reversed(padding) for amount in (p, p)])
    x, w = x.unflatten(1, (groups, -1)), weight.unflatten(0, (groups, -1))
    y = x.new_zeros(x.shape[0], groups, w.shape[1], *sizes)
    for tap in itertools.product(*map(range, weight.shape[2:])):
        window = tuple(
            slice(d * u, d * u + s * (size - 1) + 1, s)
            for u, size, s, d in zip(tap, sizes, stride, dilation, strict=True)
        )
        y = y + torch.einsum("goc,ngc...->ngo...", w[(..., *tap)], x[(..., *window)])
    y = y.flatten(1, 2)
    return y if bias is None else y + bias.reshape(-1, *(1,) * len(sizes))
