"""Sums over a sliding window in any semigroup, from `Accelerating Machine Learning Primitives on Commodity Hardware
<https://arxiv.org/abs/2310.05218>`_; the convolution of that paper is `omniconv.ops.conv` with impl="sliding".
"""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["sliding_window"]


def sliding_window(
    x: Tensor,
    size: int,
    combine: Callable[[Tensor, Tensor], Tensor] = torch.add,
    *,
    dim: int = -1,
    dilation: int = 1,
) -> Tensor:
    r"""Combine every window of neighbours in about log k steps, from `Accelerating Machine Learning Primitives on
    Commodity Hardware <https://arxiv.org/abs/2310.05218>`_.

    .. math:: y_i = x_i \circ x_{i + d} \circ \dots \circ x_{i + (k - 1) d}

    Windows of length 2 m are windows of length m combined with those that begin m later; the ones whose lengths are
    the binary digits of k are joined. With `torch.add` that is average pooling times k, with `torch.maximum` max
    pooling; along two axes, one after the other, pooling of images.

    Args:
        x: what slides past.
        size: k, length of the window.
        combine: an associative function of two tensors of one shape, entry by entry along `dim`.
        dim: the axis along which the window slides.
        dilation: d, distance between neighbours within a window.

    Shapes:
        - x: any, L along `dim`
        - output: as x, with :math:`L - d (k - 1)` along `dim`

    Raises:
        ValueError: if the window is empty or longer than x.
    """
    length = x.shape[dim] - dilation * (size - 1)
    if size < 1 or length < 1:
        raise ValueError(
            f"size must be at least 1 and fit into x: got {size}, dilation {dilation} and {x.shape[dim]}"
        )

    def joined(first: Tensor, second: Tensor, distance: int) -> Tensor:
        rest = second.shape[dim] - distance * dilation
        return combine(first.narrow(dim, 0, rest), second.narrow(dim, distance * dilation, rest))

    window, span = x, 1
    result, covered = x, 0
    while covered < size:
        if size & span:
            result = joined(result, window, covered) if covered else window
            covered += span
        if covered < size:
            window, span = joined(window, window, span), 2 * span
    return result
