"""Convolution, in 1 and 2 dimensions, by whichever lowering is fastest where it runs.

A convolution is lowered to arithmetic that a machine does well. Plain torch leaves that to its library; `im2col`
copies every window into a column of a matrix; `im2win` copies rows once, so that windows become overlapping slices
(https://arxiv.org/abs/2306.14316); `sliding` copies nothing (https://arxiv.org/abs/2310.05218).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from omniconv.ops.conv import _im2col, _im2win, _sliding, _torch
from omniconv.ops.conv.reference import reference
from omniconv.ops.dispatch import Implementation, Table

__all__ = ["conv"]

Sizes = int | Sequence[int]


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Sizes = 1,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    impl: str = "auto",
) -> Tensor:
    r"""Convolve maps with kernels; equals `torch.nn.functional.conv{1,2}d`.

    .. math:: y_{n,o,i} = b_o + \sum_{c,u} w_{o,c,u}\, x_{n, c, s i + d u - p}

    where :math:`i` and :math:`u` are positions in the map and the kernel, and c runs over the channels of o's group.

    Args:
        x: the maps.
        weight: the kernels.
        bias: added to every output channel.
        stride: s, one number or one for every axis.
        padding: p, zeros on both sides of every axis.
        dilation: d.
        groups: into how many groups the channels are divided; outputs see those of their own group.
        impl: which implementation; "auto" takes the fastest, see `omniconv.ops.explain`.

    Shapes:
        - x: :math:`(N, C, *S)` with one or two axes S
        - weight: :math:`(O, C / G, *K)` for G groups
        - bias: :math:`(O)`
        - output: :math:`(N, O, *S')` with :math:`S' = \lfloor (S + 2 p - d (K - 1) - 1) / s \rfloor + 1`

    Raises:
        ValueError: if the shapes or sizes do not fit together, or `impl` cannot take the call.
    """
    call = _prepare(x, weight, bias, stride=stride, padding=padding, dilation=dilation, groups=groups)
    return TABLE.select(impl, call).run(*call)


def _sizes(name: str, value: Sizes, axes: int, least: int) -> tuple[int, ...]:
    sizes = (value,) * axes if isinstance(value, int) else tuple(value)
    if len(sizes) != axes or any(size < least for size in sizes):
        raise ValueError(f"{name} must be one or {axes} integers of at least {least}: got {value}")
    return sizes


def _prepare(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Sizes = 1,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor | None, tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        # As torch's own convolutions do.
        low = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(low), weight.to(low)
        bias = None if bias is None else bias.to(low)
    axes = weight.ndim - 2
    if axes not in (1, 2) or x.ndim != weight.ndim:
        raise ValueError(
            "x must be (N, C, *S) and weight (O, C / groups, *K) with the same one or two axes: "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if groups < 1 or x.shape[1] != groups * weight.shape[1] or weight.shape[0] % groups:
        raise ValueError(
            f"weight must be (O, C / groups, *K) with O a multiple of groups: "
            f"got {tuple(weight.shape)}, C {x.shape[1]} and groups {groups}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},), one number a kernel: got {tuple(bias.shape)}")
    sizes = (
        _sizes("stride", stride, axes, 1), _sizes("padding", padding, axes, 0), _sizes("dilation", dilation, axes, 1),
    )  # fmt: skip
    for size, k, p, d in zip(x.shape[2:], weight.shape[2:], *sizes[1:], strict=True):
        if size + 2 * p < d * (k - 1) + 1:
            raise ValueError(
                f"the kernel must fit into the padded map: got kernel {tuple(weight.shape[2:])}, "
                f"dilation {sizes[2]}, map {tuple(x.shape[2:])} and padding {sizes[1]}"
            )
    return x, weight, bias, *sizes, groups


TABLE = Table(
    "conv",
    _prepare,
    reference,
    (
        Implementation("torch", _torch.run, _torch.supports, _torch.estimate),
        Implementation("im2col", _im2col.run, _im2col.supports, _im2col.estimate),
        Implementation("im2win", _im2win.run, _im2win.supports, _im2win.estimate),
        Implementation("sliding", _sliding.run, _sliding.supports, _sliding.estimate),
    ),
)
