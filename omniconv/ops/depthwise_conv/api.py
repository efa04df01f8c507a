"""Depthwise convolution, in 1 to 3 dimensions, by whichever implementation is fastest where it runs."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from omniconv.ops.depthwise_conv import _channels_last, _direct, _fft, _torch, _triton
from omniconv.ops.depthwise_conv.reference import reference
from omniconv.ops.dispatch import Implementation, Table

__all__ = ["depthwise_conv"]

Sizes = int | Sequence[int]


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    impl: str = "auto",
) -> Tensor:
    r"""Convolve every channel with kernels of its own; equals `torch.nn.functional.conv{1,2,3}d` with groups=C.

    .. math:: y_{n,c,i} = b_c + \sum_u w_{c,u}\, x_{n, \lfloor c / m \rfloor, s i + d u - p}

    where :math:`i` and :math:`u` are positions in the map and the kernel, of as many axes as the kernel has.

    Args:
        x: the maps.
        weight: m kernels for every channel, those of one channel side by side.
        bias: added to every output channel.
        stride: s, one number or one for every axis.
        padding: p, zeros on both sides of every axis; "valid" for none, "same" for as many as keep the size.
        dilation: d.
        impl: which implementation; "auto" takes the fastest, see `omniconv.ops.explain`.

    Shapes:
        - x: :math:`(N, C, *S)` with one to three axes S
        - weight: :math:`(m C, 1, *K)`
        - bias: :math:`(m C)`
        - output: :math:`(N, m C, *S')` with :math:`S' = \lfloor (S + 2 p - d (K - 1) - 1) / s \rfloor + 1`

    Raises:
        ValueError: if the shapes, types or sizes do not fit together, or `impl` cannot take the call.
    """
    call = _prepare(x, weight, bias, stride=stride, padding=padding, dilation=dilation)
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
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
) -> tuple[Tensor, Tensor, Tensor | None, tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        # As torch's own convolutions do.
        low = torch.get_autocast_dtype(x.device.type)
        x, weight = (t if t.dtype == torch.float64 else t.to(low) for t in (x, weight))
        bias = bias if bias is None or bias.dtype == torch.float64 else bias.to(low)
    axes = weight.ndim - 2
    if axes not in (1, 2, 3) or x.ndim != weight.ndim:
        raise ValueError(
            "x must be (N, C, *S) and weight (m C, 1, *K) with the same one to three axes: "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if weight.shape[1] != 1 or weight.shape[0] % x.shape[1]:
        raise ValueError(
            f"weight must have one input channel and a multiple of x's {x.shape[1]} channels: "
            f"got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},), one number a kernel: got {tuple(bias.shape)}")
    strides, dilations = _sizes("stride", stride, axes, 1), _sizes("dilation", dilation, axes, 1)
    if not isinstance(padding, str):
        return x, weight, bias, strides, _sizes("padding", padding, axes, 0), dilations
    if padding == "valid":
        return x, weight, bias, strides, (0,) * axes, dilations
    if padding != "same":
        raise ValueError(f"padding must be 'same', 'valid' or integers: got {padding!r}")
    if any(s != 1 for s in strides):
        raise ValueError(f"padding 'same' needs stride 1: got {stride}")
    totals = [d * (k - 1) for k, d in zip(weight.shape[2:], dilations, strict=True)]
    if any(total % 2 for total in totals):
        # An even kernel needs one zero more behind than before, as torch places it.
        x = F.pad(x, [side for total in reversed(totals) for side in (0, total % 2)])
    return x, weight, bias, strides, tuple(total // 2 for total in totals), dilations


TABLE = Table(
    "depthwise_conv",
    _prepare,
    reference,
    (
        Implementation("torch", _torch.run, _torch.supports, _torch.estimate),
        Implementation("channels_last", _channels_last.run, _channels_last.supports, _channels_last.estimate),
        Implementation("direct", _direct.run, _direct.supports, _direct.estimate),
        Implementation("fft", _fft.run, _fft.supports, _fft.estimate),
        Implementation("triton", _triton.run, _triton.supports, _triton.estimate),
    ),
)
