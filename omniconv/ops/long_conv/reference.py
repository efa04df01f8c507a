"""Long convolution as its equation reads: one shifted product for every tap of the kernel."""

import itertools

import torch
from torch import Tensor

__all__ = ["reference"]


def reference(
    x: Tensor,
    kernel: Tensor,
    skip: Tensor | None,
    gate_in: Tensor | None,
    gate_out: Tensor | None,
    origin: tuple[int, ...],
) -> Tensor:
    r"""Return the convolution of a prepared call, tap by tap.

    .. math:: y_i = g_i \Bigl( \sum_u k_u\, h_{i - u + o}\, x_{i - u + o} + D\, h_i\, x_i \Bigr)
    """
    axes = len(origin)
    x = x if gate_in is None else gate_in * x
    y = torch.zeros_like(x)
    if skip is not None:
        y = y + skip.reshape(-1, *(1,) * axes) * x
    for tap in itertools.product(*(range(k) for k in kernel.shape[1:])):
        lags = [u - o for u, o in zip(tap, origin, strict=True)]
        if any(abs(lag) >= size for lag, size in zip(lags, x.shape[2:], strict=True)):
            continue
        here = tuple(
            slice(max(0, lag), size + min(0, lag)) for lag, size in zip(lags, x.shape[2:], strict=True)
        )
        there = tuple(
            slice(max(0, -lag), size - max(0, lag)) for lag, size in zip(lags, x.shape[2:], strict=True)
        )
        term = torch.zeros_like(x)
        term[:, :, *here] = x[:, :, *there] * kernel[:, *tap].reshape(-1, *(1,) * axes)
        y = y + term
    return y if gate_out is None else gate_out * y
