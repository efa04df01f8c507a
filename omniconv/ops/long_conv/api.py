"""Convolution with kernels as long as the sequence, by whichever implementation is fastest where it runs."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from omniconv.ops.dispatch import Implementation, Table
from omniconv.ops.long_conv import _chunked, _depthwise, _estimates, _torch
from omniconv.ops.long_conv.reference import reference
from omniconv.ops.memory_format import memory_format

__all__ = ["long_conv"]


def long_conv(
    x: Tensor,
    kernel: Tensor,
    skip: Tensor | None = None,
    *,
    gate_in: Tensor | None = None,
    gate_out: Tensor | None = None,
    bidirectional: bool = False,
    impl: str = "auto",
) -> Tensor:
    r"""Convolve every channel with a kernel as long as the sequence (`Fu et al. <https://arxiv.org/abs/2302.06646>`_).

    .. math:: y_i = g_i \Bigl( \sum_u k_u\, (h x)_{i - u + o} + D\, (h x)_i \Bigr)

    with zeros beyond both ends of x, for every sample and channel alike. Causal kernels begin at lag zero, o = 0: no
    output sees the future. Those of a bidirectional convolution have lag zero in the middle, o = K // 2: kernels a for
    the past and b for the future, both beginning at the present, are `torch.cat([b.flip(-1)[..., :-1], a], -1)` where
    they share it. Taps that reach beyond the sequence are left out.

    The cost grows as L log L. Half precision is computed in float32. Along several axes, causal means so along each.

    Args:
        x: the sequences, or maps of any number of axes.
        kernel: k, of any length; one kernel a channel.
        skip: D, one weight a channel for the input itself.
        gate_in: h, multiplies the input, as in Hyena.
        gate_out: g, multiplies the output.
        bidirectional: whether lag zero is in the kernel's middle.
        impl: which implementation; "auto" takes the fastest, see `omniconv.ops.explain`.

    Shapes:
        - x, gate_in, gate_out and output: :math:`(N, C, *S)`
        - kernel: :math:`(C, *K)`
        - skip: :math:`(C)`

    Raises:
        ValueError: if the shapes do not fit together, or `impl` cannot take the call.
    """
    call = _prepare(x, kernel, skip, gate_in=gate_in, gate_out=gate_out, bidirectional=bidirectional)
    return TABLE.select(impl, call).run(*call)


def _prepare(
    x: Tensor,
    kernel: Tensor,
    skip: Tensor | None = None,
    *,
    gate_in: Tensor | None = None,
    gate_out: Tensor | None = None,
    bidirectional: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, tuple[int, ...]]:
    if x.ndim < 3 or kernel.ndim != x.ndim - 1 or kernel.shape[0] != x.shape[1]:
        raise ValueError(
            "x must be (N, C, *S) and kernel (C, *K) with as many axes and channels: "
            f"got {tuple(x.shape)} and {tuple(kernel.shape)}"
        )
    if skip is not None and skip.shape != kernel.shape[:1]:
        raise ValueError(f"skip must be ({kernel.shape[0]},), one number a channel: got {tuple(skip.shape)}")
    for name, gate in (("gate_in", gate_in), ("gate_out", gate_out)):
        if gate is not None and gate.shape != x.shape:
            raise ValueError(f"{name} must have the shape of x, {tuple(x.shape)}: got {tuple(gate.shape)}")
    origin = tuple(k // 2 if bidirectional else 0 for k in kernel.shape[1:])
    if not torch.compiler.is_compiling():
        for axis, size in enumerate(x.shape[2:]):
            first = max(0, origin[axis] - size + 1)
            last = min(kernel.shape[axis + 1], origin[axis] + size)
            kernel = kernel.narrow(axis + 1, first, last - first)
            origin = (*origin[:axis], origin[axis] - first, *origin[axis + 1 :])
    return x, kernel, skip, gate_in, gate_out, origin


def _gated(convolve: Callable[[Tensor, Tensor, tuple[int, ...]], Tensor]) -> Callable[..., Tensor]:
    """Return the operator around a bare convolution: its gates, and its skip as one more weight at lag zero."""

    def run(x, kernel, skip, gate_in, gate_out, origin) -> Tensor:
        if skip is not None:
            wide = torch.promote_types(kernel.dtype, torch.float32)
            taps = zip(reversed(kernel.shape[1:]), reversed(origin), strict=True)
            sides = [side for k, o in taps for side in (o, k - 1 - o)]
            kernel = kernel.to(wide) + F.pad(skip.to(wide).reshape(-1, *(1,) * len(origin)), sides)
        y = convolve(x if gate_in is None else gate_in * x, kernel, origin)
        y = y if gate_out is None else gate_out * y
        last = memory_format(x) == torch.channels_last
        return y.contiguous(memory_format=torch.channels_last) if last else y

    return run


TABLE = Table(
    "long_conv",
    _prepare,
    reference,
    (
        Implementation("torch", _gated(_torch.convolve), _torch.supports, _estimates.plain),
        Implementation("chunked", _gated(_chunked.convolve), _chunked.supports, _estimates.chunked),
        Implementation("depthwise", _gated(_depthwise.convolve), _depthwise.supports, _estimates.depthwise),
        Implementation(
            "monarch", _gated(_chunked.by_matrices), _chunked.supports_matrices, _estimates.monarch
        ),
    ),
)
