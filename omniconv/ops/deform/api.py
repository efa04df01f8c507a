"""Deformable aggregation and convolution.

Papers: Dai et al., Deformable Convolutional Networks, https://arxiv.org/abs/1703.06211; DCNv2, Zhu et al.,
https://arxiv.org/abs/1811.11168; InternImage with DCNv3, Wang et al., https://arxiv.org/abs/2211.05778; DCNv4, Xiong et
al., https://arxiv.org/abs/2401.06197. One operator is behind all of them; what differs is what the caller does with the
samples and how the masks are bounded:

- v1: samples kept, no mask, then a dense kernel (`deform_conv2d`);
- v2: the same with masks out of a sigmoid;
- v3: samples added up, masks out of a softmax over the taps of a group;
- v4: samples added up, masks of any size and sign.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from omniconv.ops.deform import _compiled, _torch, _triton
from omniconv.ops.deform.reference import reference
from omniconv.ops.dispatch import Implementation, Table

__all__ = ["deform_aggregate", "deform_conv2d"]

Sizes = int | Sequence[int]


def deform_aggregate(
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None = None,
    *,
    kernel_size: Sizes = 3,
    stride: Sizes = 1,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    offset_scale: float = 1.0,
    keep_taps: bool = False,
    impl: str = "auto",
) -> Tensor:
    r"""Add up samples at positions of their own, as `DCNv4 <https://arxiv.org/abs/2401.06197>`_ does.

    .. math:: y_g(p_0) = \sum_{k=1}^{K} m_{gk}(p_0)\, x_g(p_0 + s\,(p_k + \Delta p_{gk}(p_0)))

    where :math:`p_k` are the taps of a kernel about its centre :math:`p_0`. Between pixels x is bilinear, beyond its
    border zero; positions that are not finite count as beyond it.

    Args:
        x: the maps; fastest in channels-last memory, which the output has in any case.
        offset: :math:`\Delta p` in pixels, for every group and tap a row and a column offset side by side.
        mask: m, for every group and tap; None for ones.
        kernel_size: taps along both axes, K together.
        stride: pixels between two kernel centres.
        padding: pixels by which the kernel may stand out on every side.
        dilation: pixels between two taps.
        offset_scale: s.
        keep_taps: return the K samples side by side instead of their sum.
        impl: which implementation; "auto" takes the fastest, see `omniconv.ops.explain`.

    Shapes:
        - x: :math:`(N, C, H, W)`
        - offset: :math:`(N, 2 G K, H', W')` with a number of groups G that divides C
        - mask: :math:`(N, G K, H', W')`
        - output: :math:`(N, C, H', W')`, or :math:`(N, K, C, H', W')` with `keep_taps`

    Raises:
        ValueError: if the shapes or sizes do not fit together, or `impl` cannot take the call.
    """
    call = _prepare(
        x, offset, mask, kernel_size=kernel_size, stride=stride, padding=padding, dilation=dilation,
        offset_scale=offset_scale, keep_taps=keep_taps,
    )  # fmt: skip
    return TABLE.select(impl, call).run(*call)


def deform_conv2d(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    stride: Sizes = 1,
    padding: Sizes = 0,
    dilation: Sizes = 1,
) -> Tensor:
    r"""Convolve samples at positions of their own: `DCNv1 <https://arxiv.org/abs/1703.06211>`_, with a mask DCNv2.

    .. math:: y(p_0) = b + \sum_{k=1}^{K} w_k\, m_k(p_0)\, x(p_0 + p_k + \Delta p_k(p_0))

    Args:
        x: the maps.
        offset: as in `deform_aggregate`.
        weight: the kernel; its number of input channels says into how many groups g the channels fall.
        bias: b, added to every output channel.
        mask: as in `deform_aggregate`.
        stride: pixels between two kernel centres.
        padding: pixels by which the kernel may stand out on every side.
        dilation: pixels between two taps.

    Shapes:
        - x: :math:`(N, C, H, W)`
        - weight: :math:`(O, C / g, K_h, K_w)`
        - output: :math:`(N, O, H', W')`

    Raises:
        ValueError: if the shapes do not fit together.
    """
    out, depth, *kernel = weight.shape
    channels = x.shape[1]
    if channels % depth or out % (channels // depth):
        raise ValueError(
            f"weight must be (O, C / g, K, K) for x's C = {channels} channels in g groups: got {tuple(weight.shape)}"
        )
    samples = deform_aggregate(
        x, offset, mask, kernel_size=kernel, stride=stride, padding=padding, dilation=dilation, keep_taps=True
    ).permute(0, 3, 4, 1, 2)
    taps = weight.flatten(2)
    if depth == channels:
        y = F.linear(samples.flatten(3), taps.transpose(1, 2).flatten(1))
    else:
        grouped = samples.unflatten(-1, (-1, depth))
        y = torch.einsum("nijkgc,gock->nijgo", grouped, taps.unflatten(0, (channels // depth, -1))).flatten(3)
    y = (y if bias is None else y + bias).permute(0, 3, 1, 2)
    return y.contiguous(memory_format=torch.channels_last)


def _pair(name: str, value: Sizes, least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or any(size < least for size in pair):
        raise ValueError(f"{name} must be one or two integers of at least {least}: got {value}")
    return pair[0], pair[1]


def _prepare(
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None = None,
    *,
    kernel_size: Sizes = 3,
    stride: Sizes = 1,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    offset_scale: float = 1.0,
    keep_taps: bool = False,
):
    kernel, strides = _pair("kernel_size", kernel_size, 1), _pair("stride", stride, 1)
    paddings, dilations = _pair("padding", padding, 0), _pair("dilation", dilation, 1)
    if x.ndim != 4 or offset.ndim != 4 or x.shape[0] != offset.shape[0]:
        raise ValueError(
            "x must be (N, C, H, W) and offset (N, 2 G K, H', W'): "
            f"got {tuple(x.shape)} and {tuple(offset.shape)}"
        )
    taps, channels = kernel[0] * kernel[1], x.shape[1]
    groups = offset.shape[1] // (2 * taps)
    if offset.shape[1] % (2 * taps) or groups == 0 or channels % groups:
        raise ValueError(
            f"offset must have 2 x {taps} channels for each group, and the groups must divide x's "
            f"{channels} channels: got {offset.shape[1]}"
        )
    size = [
        (s + 2 * p - d * (k - 1) - 1) // step + 1
        for s, p, d, k, step in zip(x.shape[2:], paddings, dilations, kernel, strides, strict=True)
    ]
    if list(offset.shape[2:]) != size:
        raise ValueError(f"offset must be of the output's size {tuple(size)}: got {tuple(offset.shape[2:])}")
    if mask is not None and mask.shape != (x.shape[0], groups * taps, *size):
        wanted = (x.shape[0], groups * taps, *size)
        raise ValueError(f"mask must be {wanted}, one number a tap: got {tuple(mask.shape)}")
    return x, offset, mask, kernel, strides, paddings, dilations, float(offset_scale), keep_taps


TABLE = Table(
    "deform_aggregate",
    _prepare,
    reference,
    (
        Implementation("torch", _torch.run, _torch.supports, _torch.estimate),
        Implementation("compiled", _compiled.run, _compiled.supports, _compiled.estimate),
        Implementation("triton", _triton.run, _triton.supports, _triton.estimate),
    ),
)
