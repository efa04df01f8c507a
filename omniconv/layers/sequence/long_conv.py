"""Long convolution with free kernels: as many weights as the sequence has steps, kept well behaved by squashing.

Paper: Fu et al., Simple Hardware-Efficient Long Convolutions for Sequence Modeling, https://arxiv.org/abs/2302.06646.
Where state spaces parametrise their kernel, this layer learns every tap. Small taps are squashed to zero on every
pass, or the kernel is smoothed. The paper's block adds GELU and a gated projection:
`omniconv.layers.sequence.block.GatedBlock` around this layer. Kernels want a smaller learning rate than the rest,
and no weight decay.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.cases import Case, Raises
from omniconv.ops.long_conv.api import long_conv
from omniconv.ops.long_conv.monarch import factors, fourier, inverse

__all__ = ["Butterfly", "LongConv", "smooth", "squash"]


def squash(kernel: Tensor, threshold: float) -> Tensor:
    r"""Return the soft threshold :math:`\mathrm{sign}(k) \max(|k| - \lambda, 0)` of every tap."""
    return F.softshrink(kernel, threshold)


def smooth(kernel: Tensor, window: int, domain: str) -> Tensor:
    """Return kernels averaged over `window` neighbours, of time or of frequency, with zeros beyond the ends."""
    if domain == "time":
        return F.avg_pool1d(kernel, window, 1, window // 2)
    spectrum = torch.fft.rfft(kernel.to(torch.promote_types(kernel.dtype, torch.float32)))
    parts = torch.view_as_real(spectrum).movedim(-1, 0)
    real, imaginary = (F.avg_pool1d(part, window, 1, window // 2) for part in parts)
    return torch.fft.irfft(torch.complex(real, imaginary), kernel.shape[-1]).to(kernel.dtype)


class Butterfly(nn.Module):
    r"""Learned transform of n points that starts as Fourier's (`FlashButterfly <https://arxiv.org/abs/2302.06646>`_).

    .. math:: f = B_p P_p \cdots B_1 P_1 z, \qquad B_i = \mathrm{diag}(B_{i,1}, \dots, B_{i,n/n_i})

    where :math:`n = n_1 \cdots n_p`, the permutations :math:`P_i` bring the digits of time to the front one after the
    other, and each of the n / n_i blocks is a free complex matrix of n_i rows. Equal factors make this
    :math:`p\, n^{(p+1)/p}` complex weights. Frequencies come in the order of `omniconv.ops.long_conv.monarch`.

    Args:
        length: n.
        order: p, the number of factors.
        device, dtype: of the parameters.

    Shapes:
        - input and output: :math:`(*, n, 2)`, real and imaginary parts

    Raises:
        ValueError: if `order` is less than 1.
    """

    def __init__(self, length: int, order: int = 2, *, device=None, dtype=None) -> None:
        super().__init__()
        if order < 1:
            raise ValueError(f"order must be at least 1: got {order}")
        self.factors = factors(length, order)
        self.blocks = nn.ParameterList(
            torch.empty(length // n, n, n, 2, device=device, dtype=dtype) for n in self.factors
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the blocks to those of the Fourier transform, each with the rotations that follow it."""
        done = 1
        for n, block in zip(self.factors, self.blocks, strict=True):
            rest = block.shape[0] // done
            like = torch.empty((), dtype=torch.complex128, device=block.device)
            turns = fourier(n, rest, n * rest, like).T[:, :, None]
            block.copy_(torch.view_as_real(turns * fourier(n, n, n, like)).repeat(done, 1, 1, 1))
            done *= n

    def forward(self, z: Tensor) -> Tensor:
        """Transform the last axis but one of `z`."""
        wide = z.to(torch.promote_types(z.dtype, torch.float32))
        # Digits of frequency so far, digits of time to come, samples.
        f = torch.complex(wide[..., 0], wide[..., 1]).flatten(0, -2).T[None]
        for n, block in zip(self.factors, self.blocks, strict=True):
            matrices = torch.complex(block[..., 0].to(wide.dtype), block[..., 1].to(wide.dtype))
            digit = f.unflatten(1, (n, -1)).transpose(1, 2)
            done, rest = digit.shape[:2]
            f = (matrices @ digit.flatten(0, 1)).unflatten(0, (done, rest)).transpose(1, 2).flatten(0, 1)
        return torch.view_as_real(f[:, 0].T.reshape(z.shape[:-1])).to(z.dtype)


class LongConv(nn.Module):
    r"""Convolution of every channel with a free kernel (`Fu et al. <https://arxiv.org/abs/2302.06646>`_).

    .. math:: y = S(k) * x + D x, \qquad S(k) = \mathrm{sign}(k) \max(|k| - \lambda, 0)

    Args:
        channels: channels C.
        length: L, steps over which the kernel reaches; inputs may be shorter or longer.
        bidirectional: have 2 L taps, half of them for the future.
        squash: lambda; 0 for none.
        smooth: average kernels over neighbours in "time" or in "frequency" before squashing.
        window: neighbours that `smooth` averages, odd.
        dropout: share of taps that are zeroed in training.
        init: "random" taps of deviation 0.002, or "decay": of deviation 0.02 and falling as
            :math:`\exp(-\frac{t}{L} (C / 2)^{c / C})`, from channel to channel faster.
        butterfly: order of learned transforms of x and k in the place of Fourier's; 0 for those. Inputs must then
            not be longer than `length`.
        device, dtype: of the parameters.

    Shapes:
        - input and output: :math:`(N, C, L)`

    Raises:
        ValueError: if `smooth` or `init` is unknown, `window` is even, or a learned transform is to be bidirectional.
    """

    def __init__(
        self,
        channels: int,
        length: int,
        *,
        bidirectional: bool = False,
        squash: float = 0.003,
        smooth: Literal["time", "frequency"] | None = None,
        window: int = 7,
        dropout: float = 0.0,
        init: Literal["random", "decay"] = "random",
        butterfly: int = 0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if smooth not in ("time", "frequency", None):
            raise ValueError(f"smooth must be 'time', 'frequency' or None: got {smooth!r}")
        if init not in ("random", "decay"):
            raise ValueError(f"init must be 'random' or 'decay': got {init!r}")
        if window < 1 or window % 2 == 0:
            raise ValueError(f"window must be odd and positive: got {window}")
        if butterfly and bidirectional:
            raise ValueError("a learned butterfly is for causal kernels: give bidirectional=False")
        self.bidirectional, self.init = bidirectional, init
        self.squash, self.smooth, self.window, self.dropout = squash, smooth, window, dropout
        taps = 2 * length if bidirectional else length
        self.kernel = nn.Parameter(torch.empty(channels, taps, device=device, dtype=dtype))
        self.skip = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        # Powers of two factor evenly.
        points = 2 ** (2 * length - 1).bit_length()
        self.factors = factors(points, butterfly or 1)
        self.transforms = nn.ModuleList(
            Butterfly(points, butterfly, device=device, dtype=dtype) for _ in range(2 if butterfly else 0)
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new kernels and skips; learned transforms become Fourier's."""
        nn.init.normal_(self.skip)
        nn.init.normal_(self.kernel, std=0.002 if self.init == "random" else 0.02)
        if self.init == "decay":
            channels, taps = self.kernel.shape
            place = {"device": self.kernel.device, "dtype": self.kernel.dtype}
            rates = (channels / 2) ** (torch.arange(channels, **place) / channels)
            times = torch.arange(taps, **place)
            lags = (times - taps // 2).abs() / (taps // 2) if self.bidirectional else times / taps
            self.kernel.mul_(torch.exp(-lags * rates[:, None]))
        for transform in self.transforms:
            transform.reset_parameters()  # pyright: ignore[reportCallIssue]

    def taps(self) -> Tensor:
        """Return the kernels (C, L) as they are convolved: smoothed, squashed, and with dropout in training."""
        kernel = self.kernel if self.smooth is None else smooth(self.kernel, self.window, self.smooth)
        return F.dropout(squash(kernel, self.squash), self.dropout, self.training)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve every channel of `x`."""
        if not self.transforms:
            return long_conv(x, self.taps(), self.skip, bidirectional=self.bidirectional)
        of_x, of_kernel = self.transforms
        points = math.prod(self.factors)
        wide = torch.promote_types(x.dtype, torch.float32)
        f, k = (
            torch.view_as_complex(transform(F.pad(t.to(wide)[..., None], (0, 1, 0, points - t.shape[-1]))))
            for transform, t in ((of_x, x), (of_kernel, self.taps()))
        )
        y = inverse(f * k, self.factors).real[..., : x.shape[2]]
        return y.to(x.dtype) + self.skip[:, None] * x


def _case(id: str, raises: tuple[Raises, ...] = (), **more) -> Case:
    return Case(
        LongConv, {"channels": 3, "length": 9, **more}, inputs=((2, 3, 6),), output=(2, 3, 6), id=id,
        vary=(0, 2), minimal=(1, 3, 1), raises=raises,
    )  # fmt: skip


CASES = (
    _case(
        "causal",
        raises=(
            Raises(
                ValueError, "smooth must be 'time', 'frequency' or None: got 'space'", {"smooth": "space"}
            ),
            Raises(ValueError, "init must be 'random' or 'decay': got 'zeros'", {"init": "zeros"}),
            Raises(ValueError, "window must be odd and positive: got 4", {"window": 4}),
            Raises(
                ValueError,
                "a learned butterfly is for causal kernels: give bidirectional=False",
                {"butterfly": 2, "bidirectional": True},
            ),
        ),
    ),
    _case("both", bidirectional=True, init="decay", dropout=0.1),
    _case("time", smooth="time", window=3),
    _case("frequency", smooth="frequency", window=3),
    _case("butterfly", butterfly=2),
    Case(
        Butterfly,
        {"length": 12, "order": 2},
        inputs=((3, 5, 12, 2),),
        output=(3, 5, 12, 2),
        vary=(0, 1),
        channels_last=False,
        raises=(Raises(ValueError, "order must be at least 1: got 0", {"order": 0}),),
    ),
)
