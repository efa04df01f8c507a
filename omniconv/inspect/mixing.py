"""What kind of convolution a layer is, told from its derivatives.

Paper: Zhou et al., Interpret Vision Transformers as ConvNets with Dynamic Convolutions,
https://arxiv.org/abs/2309.10713, which sets attention and dynamic convolutions side by side by the size of their
kernels, what generates them, and over which places and channels they are shared.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["MixingView", "probe_mixing"]


@dataclass(frozen=True)
class MixingView:
    """What kind of convolution a layer is.

    Attributes:
        kernel_size: pixels along a side of the window that an output pixel sees; 0 for the whole map.
        dynamic: the kernels depend on the input.
        shared_over_space: every place has the same kernel.
        patterns: linearly independent kernels among those of all pairs of an input and an output channel: as many as
            heads or groups where channels share them.
    """

    kernel_size: int
    dynamic: bool
    shared_over_space: bool
    patterns: int


def probe_mixing(
    mix: Callable[[Tensor, Tensor], Tensor], channels: int, size: tuple[int, int] = (6, 7)
) -> MixingView:
    """Find out what kind of convolution a function is.

    Args:
        mix: of (x, source), both maps (1, C, H, W) in float64: x, mixed by the kernels that source generates.
        channels: C.
        size: H and W of the maps, at least as large as the kernels.

    Raises:
        ValueError: if `mix` is not linear in x, up to a bias, so that no kernels are behind it.
    """
    random = torch.Generator().manual_seed(0)
    x, other, source, second = torch.randn(4, 1, channels, *size, generator=random, dtype=torch.float64)

    def kernels(source: Tensor) -> Tensor:
        """Return the derivative of every output (C', i, j) by every input (C, h, w)."""
        jacobian = torch.autograd.functional.jacobian(lambda x: mix(x, source), x)
        assert isinstance(jacobian, Tensor)
        return jacobian[0, :, :, :, 0]

    weights = kernels(source)
    scale = weights.abs().max()

    def same(a: Tensor, b: Tensor) -> bool:
        return bool((a - b).abs().max() <= 1e-9 * scale)

    expected = torch.einsum("oijchw,chw->oij", weights, (x - other)[0])
    if not torch.allclose(expected, (mix(x, source) - mix(other, source))[0]):
        raise ValueError("mix must be linear in x: generate kernels from source alone")
    seen = (weights.abs() > 1e-9 * scale).sum((0, 3)) > 0  # i, j, h, w
    i, j, h, w = seen.nonzero().T
    extent = 2 * int(torch.maximum((i - h).abs(), (j - w).abs()).max()) + 1
    pairs = weights.permute(0, 3, 1, 2, 4, 5).flatten(2).flatten(0, 1)
    return MixingView(
        kernel_size=0 if bool(seen.all()) else extent,
        dynamic=not same(weights, kernels(second)),
        shared_over_space=same(weights[:, 1:, 1:, :, 1:, 1:], weights[:, :-1, :-1, :, :-1, :-1]),
        patterns=int(torch.linalg.matrix_rank(pairs, rtol=1e-8)),
    )
