"""Sparse convolution along a kernel map, by whichever implementation is fastest where it runs."""

import torch
from torch import Tensor

from omniconv.ops.dispatch import Implementation, Table
from omniconv.ops.sparse_conv import _pairs, _torch
from omniconv.ops.sparse_conv.reference import reference

__all__ = ["sparse_conv"]


def sparse_conv(x: Tensor, weight: Tensor, neighbours: Tensor, *, impl: str = "auto") -> Tensor:
    r"""Convolve the features of active sites along a kernel map.

    .. math:: y_q = \sum_{u:\ \nu_{qu} \ge 0} W_u\, x_{\nu_{qu}}

    Submanifold, strided and dilating sparse convolutions differ by the map alone, which
    `omniconv.ops.sparse_conv.maps.kernel_map` builds.

    Args:
        x: features of the P active input sites.
        weight: the kernel, as torch's dense convolutions have it, with K taps in all.
        neighbours: the kernel map :math:`\nu`: the row of x under tap u of output site q, or -1.
        impl: which implementation; "auto" takes the fastest, see `omniconv.ops.explain`.

    Shapes:
        - x: :math:`(P, C)`
        - weight: :math:`(C', C, *k)` with :math:`\prod k = K`
        - neighbours: :math:`(Q, K)`, int64
        - output: :math:`(Q, C')`

    Raises:
        ValueError: if the shapes or types do not fit together, or `impl` cannot take the call.
    """
    call = _prepare(x, weight, neighbours)
    return TABLE.select(impl, call).run(*call)


def _prepare(x: Tensor, weight: Tensor, neighbours: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        low = torch.get_autocast_dtype(x.device.type)
        x, weight = (t if t.dtype == torch.float64 else t.to(low) for t in (x, weight))
    if x.ndim != 2 or weight.ndim < 3 or weight.shape[1] != x.shape[1]:
        raise ValueError(
            "x must be (P, C) and weight (C', C, *k) with the same C: "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    taps = weight.shape[2:].numel()
    if neighbours.ndim != 2 or neighbours.shape[1] != taps:
        raise ValueError(f"neighbours must be (Q, {taps}), one column a tap: got {tuple(neighbours.shape)}")
    if neighbours.dtype != torch.int64:
        raise ValueError(f"neighbours must be int64: got {neighbours.dtype}")
    return x, weight, neighbours


TABLE = Table(
    "sparse_conv",
    _prepare,
    reference,
    (
        Implementation("torch", _torch.run, _torch.supports, _torch.estimate),
        Implementation("pairs", _pairs.run, _pairs.supports, _pairs.estimate),
    ),
)
