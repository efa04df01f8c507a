"""SGConv: a convolution as long as the sequence whose kernel gets coarser and weaker with the distance.

Paper: Li et al., What Makes Convolutional Models Great on Long Sequence Modeling?, https://arxiv.org/abs/2210.09298.
Few parameters (their number grows with the logarithm of the length) and decay are what make it work; no state space
is needed.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.cases import Case, Raises
from omniconv.ops.long_conv.api import long_conv
from omniconv.ops.long_conv.stream import LongConvStream

__all__ = ["SGConv", "sgconv_scales"]


def sgconv_scales(length: int, kernel_size: int) -> int:
    r"""Return the number of sub-kernels :math:`1 + \lceil \log_2(L / d) \rceil` that together are L steps long."""
    return 1 + max(0, math.ceil(math.log2(length / kernel_size)))


class SGConv(nn.Module):
    r"""Structured global convolution of every channel (`SGConv <https://arxiv.org/abs/2210.09298>`_).

    .. math:: y = k * x + D x, \qquad
              k = \frac{1}{Z} \bigl[w_0,\ \alpha\, \mathrm{Up}_{d}(w_1),\ \dots,\
              \alpha^{n-1} \mathrm{Up}_{2^{n-2} d}(w_{n-1})\bigr]

    where the sub-kernels :math:`w_i` have d taps each, :math:`\mathrm{Up}_m` enlarges them to m taps by interpolation,
    and Z is the norm that the kernel has when it is drawn. Maps are read row by row, as one sequence.

    Args:
        channels: channels C.
        length: steps L over which the kernel reaches; sets the number n of sub-kernels.
        kernel_size: d.
        decay: alpha, or its first and last value of a spread over the channels.
        overlap: add sub-kernels of :math:`2^i d` taps that all begin at lag zero, instead of joining them.
        bidirectional: have a second kernel for the future.
        upsampling: "linear" or "nearest".
        device, dtype: of the parameters.

    Shapes:
        - input and output: :math:`(N, C, *S)` with any sizes S

    Raises:
        ValueError: if a size is not positive or `upsampling` is unknown.
    """

    norm: Tensor
    scales: Tensor

    def __init__(
        self,
        channels: int,
        length: int = 1024,
        kernel_size: int = 64,
        *,
        decay: float | tuple[float, float] = 0.5,
        overlap: bool = False,
        bidirectional: bool = False,
        upsampling: str = "linear",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if length < 1 or kernel_size < 1:
            raise ValueError(f"length and kernel_size must be positive: got {length} and {kernel_size}")
        if upsampling not in ("linear", "nearest"):
            raise ValueError(f"upsampling must be 'linear' or 'nearest': got {upsampling!r}")
        self.overlap = overlap
        self.bidirectional = bidirectional
        self.upsampling = upsampling
        self.decay = decay if isinstance(decay, tuple) else (decay, decay)
        directions, count = 1 + bidirectional, sgconv_scales(length, kernel_size)
        options = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(directions, channels, count, kernel_size, **options))
        self.skip = nn.Parameter(torch.empty(channels, **options))
        self.register_buffer("scales", torch.empty(channels, count, **options))
        self.register_buffer("norm", torch.empty(directions, channels, 1, **options))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new sub-kernels, and measure the norm Z of what they make."""
        nn.init.normal_(self.weight)
        nn.init.normal_(self.skip)
        with torch.no_grad():
            alpha = torch.linspace(*self.decay, self.skip.shape[0], device=self.skip.device)
            self.scales.copy_(alpha[:, None] ** torch.arange(self.scales.shape[1], device=alpha.device))
            self.norm.fill_(1)
            self.norm.copy_(torch.linalg.vector_norm(self._directions(), dim=-1, keepdim=True))

    def _directions(self) -> Tensor:
        """Return the kernel of each direction, (1 or 2, C, K)."""
        parts = (self.weight * self.scales[..., None]).unbind(2)
        factors = [2**i if self.overlap else 2 ** max(i - 1, 0) for i in range(len(parts))]
        parts = [
            F.interpolate(p, scale_factor=f, mode=self.upsampling)
            for p, f in zip(parts, factors, strict=True)
        ]
        if self.overlap:
            longest = parts[-1].shape[-1]
            kernel = torch.stack([F.pad(p, (0, longest - p.shape[-1])) for p in parts]).sum(0)
        else:
            kernel = torch.cat(parts, -1)
        return kernel / self.norm

    def kernel(self) -> Tensor:
        """Return k, (C, K), as `omniconv.ops.long_conv` takes it."""
        if self.bidirectional:
            past, future = self._directions()
            return torch.cat([future.flip(-1), past], -1)
        return self._directions()[0]

    def forward(self, x: Tensor) -> Tensor:
        """Convolve all steps at once."""
        y = long_conv(x.flatten(2), self.kernel(), self.skip, bidirectional=self.bidirectional)
        return y.reshape(x.shape)

    def stream(self, block: int = 1) -> LongConvStream:
        """Return the layer as it is now as a function of the next `block` steps (N, C, B), for inference.

        Raises:
            ValueError: if the layer is bidirectional.
        """
        if self.bidirectional:
            raise ValueError("a bidirectional SGConv cannot stream; use bidirectional=False")
        return LongConvStream(self.kernel(), self.skip.detach(), block=block)


CASES = (
    Case(
        SGConv,
        {"channels": 3, "length": 20, "kernel_size": 4},
        inputs=((2, 3, 17),),
        output=(2, 3, 17),
        vary=(0, 2),
        minimal=(1, 3, 1),
        raises=(
            Raises(ValueError, "length and kernel_size must be positive: got 0 and 4", {"length": 0}),
            Raises(
                ValueError, "upsampling must be 'linear' or 'nearest': got 'cubic'", {"upsampling": "cubic"}
            ),
        ),
    ),
    Case(
        SGConv,
        {
            "channels": 3,
            "length": 11,
            "kernel_size": 3,
            "overlap": True,
            "bidirectional": True,
            "decay": (0.4, 0.9),
        },
        inputs=((2, 3, 13),),
        output=(2, 3, 13),
        id="bidirectional",
        vary=(0, 2),
        minimal=(1, 3, 1),
    ),
    Case(
        SGConv,
        {"channels": 3, "length": 35, "kernel_size": 4, "bidirectional": True, "upsampling": "nearest"},
        inputs=((2, 3, 5, 7),),
        output=(2, 3, 5, 7),
        id="maps",
        minimal=(1, 3, 1, 1),
        channels_last=False,
    ),
)
