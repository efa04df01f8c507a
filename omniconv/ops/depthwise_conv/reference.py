"""Depthwise convolution as its equation reads: one shifted product for every tap of the kernel."""

import itertools

from torch import Tensor
from torch.nn import functional as F

__all__ = ["reference"]


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor:
    r"""Return the convolution of a prepared call, tap by tap.

    .. math:: y_{n,c,i} = b_c + \sum_u w_{c,u}\, x_{n, \lfloor c / m \rfloor, s i + d u - p}
    """
    kernel = weight.shape[2:]
    sides = [amount for p in reversed(padding) for amount in (p, p)]
    x = F.pad(x, sides).repeat_interleave(weight.shape[0] // x.shape[1], 1)
    sizes = [
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)
    ]
    y = x.new_zeros(x.shape[0], weight.shape[0], *sizes)
    for tap in itertools.product(*(range(k) for k in kernel)):
        window = tuple(
            slice(d * u, d * u + s * (size - 1) + 1, s)
            for u, size, s, d in zip(tap, sizes, stride, dilation, strict=True)
        )
        w = weight[(slice(None), 0, *tap)].reshape(-1, *(1,) * len(kernel))
        y = y + w * x[(slice(None), slice(None), *window)]
    return y if bias is None else y + bias.reshape(-1, *(1,) * len(kernel))
