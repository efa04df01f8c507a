"""The inverse of a convolution that is padded at one corner, as an operator with gradients.

Papers: Kallappa, Nagar and Varma, FInC Flow, https://arxiv.org/abs/2301.09266 (the convolution and its parallel
inverse); Nagar and Varma, https://arxiv.org/abs/2410.14634 (the gradients).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from omniconv.ops.dispatch import Implementation, Table
from omniconv.ops.inverse_conv import _compiled, _torch
from omniconv.ops.inverse_conv._torch import free
from omniconv.ops.inverse_conv.reference import reference

__all__ = ["corner_conv", "inverse_conv"]


def corner_conv(x: Tensor, weight: Tensor, axes: Sequence[int] = ()) -> Tensor:
    r"""Convolve maps padded with zeros above and to the left; `FInC Flow <https://arxiv.org/abs/2301.09266>`_.

    .. math:: y_{i,j} = L x_{i,j} + \sum_{(a,b) \neq (0,0)} W_{k-1-a,k-1-b}\, x_{i-a,j-b}

    where L is the last tap's part below the diagonal, with ones on it; the rest of that tap is not read. So every pixel
    and channel depends on itself with factor one, and on earlier ones: the determinant is 1.

    Args:
        x: the maps.
        weight: the kernel.
        axes: those of 2 and 3 along which everything is mirrored: zeros come below for 2, to the right for 3.

    Shapes:
        - x and output: :math:`(N, C, H, W)`
        - weight: :math:`(C, C, k_h, k_w)`

    Raises:
        ValueError: if the shapes do not fit together.
    """
    _require_square(x, weight)
    one = torch.zeros_like(weight)
    one[:, :, -1, -1] = torch.eye(weight.shape[0], dtype=weight.dtype, device=weight.device)
    sides = [
        side
        for axis in (3, 2)
        for side in ((weight.shape[axis] - 1, 0) if axis not in axes else (0, weight.shape[axis] - 1))
    ]
    return F.conv2d(F.pad(x, sides), (weight * free(weight) + one).flip(tuple(axes)))


def inverse_conv(y: Tensor, weight: Tensor, *, impl: str = "auto") -> Tensor:
    r"""Invert `corner_conv`, after `Nagar and Varma <https://arxiv.org/abs/2410.14634>`_.

    .. math:: x_{i,j} = L^{-1} \Bigl( y_{i,j} - \sum_{(a,b) \neq (0,0)} W_{k-1-a,k-1-b}\, x_{i-a,j-b} \Bigr)

    Pixels of one anti-diagonal do not depend on one another: H + W - 1 steps suffice. The gradient by y is such an
    inverse again, with the transposed kernel from the opposite corner.

    Args:
        y: the maps.
        weight: the kernel; of its last tap only what lies below the diagonal is read.
        impl: which implementation; "auto" takes the fastest, see `omniconv.ops.explain`.

    Shapes:
        - y and output: :math:`(N, C, H, W)`
        - weight: :math:`(C, C, k_h, k_w)`

    Raises:
        ValueError: if the shapes do not fit together, or `impl` cannot take the call.
    """
    if y.device.type != "meta" and torch.is_autocast_enabled(y.device.type):
        # Errors grow from pixel to pixel.
        with torch.autocast(y.device.type, enabled=False):
            wide = torch.promote_types(y.dtype, torch.float32)
            return inverse_conv(y.to(wide), weight.to(wide), impl=impl)
    call = _prepare(y, weight)
    return TABLE.select(impl, call).run(*call)


def _require_square(y: Tensor, weight: Tensor) -> None:
    if y.ndim != 4 or weight.ndim != 4 or weight.shape[:2] != (y.shape[1], y.shape[1]):
        raise ValueError(
            "maps must be (N, C, H, W) and weight (C, C, kh, kw) with the same channels: "
            f"got {tuple(y.shape)} and {tuple(weight.shape)}"
        )


def _prepare(y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    _require_square(y, weight)
    if y.dtype != weight.dtype:
        raise ValueError(f"maps and weight must be of one type: got {y.dtype} and {weight.dtype}")
    return y, weight


TABLE = Table(
    "inverse_conv",
    _prepare,
    reference,
    (
        Implementation("torch", _torch.run, _torch.supports, _torch.estimate),
        Implementation("compiled", _compiled.run, _compiled.supports, _compiled.estimate),
    ),
)
