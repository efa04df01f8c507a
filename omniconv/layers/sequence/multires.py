"""Multiresolution convolution: two short causal filters, used again at every scale of a dilated tree.

Paper: Shi et al., Sequence Modeling with Multiresolution Convolutional Memory, https://arxiv.org/abs/2305.01638.
A wavelet transform without decimation whose filters are learnt; the output is a weighted sum of the coefficients
that a step's memory keeps.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.cases import Case, Raises
from omniconv.ops.depthwise_conv.api import depthwise_conv

__all__ = ["MultiresConv", "MultiresState", "multires_depth"]

_SQRT3 = math.sqrt(3.0)
# Low-pass filters of Daubechies' wavelets, the newest sample first.
_WAVELETS = {
    2: (math.sqrt(0.5), math.sqrt(0.5)),
    4: tuple(t / (4 * math.sqrt(2.0)) for t in (1 - _SQRT3, 3 - _SQRT3, 3 + _SQRT3, 1 + _SQRT3)),
}


def multires_depth(length: int, kernel_size: int) -> int:
    r"""Return the levels :math:`J = \lceil \log_2((L - 1) / (k - 1) + 1) \rceil` after which a step sees L others."""
    return math.ceil(math.log2((length - 1) / (kernel_size - 1) + 1))


class _DelayLine:
    """A ring buffer from which `taps` values are read, `spacing` steps apart, the newest first."""

    def __init__(self, like: Tensor, taps: int, spacing: int) -> None:
        self.buffer = like.new_zeros(*like.shape, (taps - 1) * spacing + 1)
        self.offsets = spacing * torch.arange(taps, device=like.device)
        self.position = 0

    def push(self, x: Tensor) -> Tensor:
        """Store `x` and return it with its predecessors on a last axis."""
        size = self.buffer.shape[-1]
        self.buffer[..., self.position] = x
        values = self.buffer[..., (self.position - self.offsets) % size]
        self.position = (self.position + 1) % size
        return values


class MultiresState:
    """What `MultiresConv.step` remembers: the past of every level's approximations and kept details."""

    def __init__(self, low: list[_DelayLine], high: list[_DelayLine]) -> None:
        self.low = low
        self.high = high


class MultiresConv(nn.Module):
    r"""Causal `multiresolution convolution <https://arxiv.org/abs/2305.01638>`_ of every channel.

    .. math:: a_{j+1}(t) = \sum_{i<k} h^0_i\, a_j(t - 2^j i), \qquad b_{j+1}(t) = \sum_{i<k} h^1_i\, a_j(t - 2^j i)

    .. math:: y(t) = v\, x(t) + w\, a_J(t) + \sum_{j=1}^{J} \sum_{i<m_j} w_{ji}\, b_j(t - 2^j i)

    where :math:`a_0 = x` and all are zero before the start. A fading memory keeps the newest detail of each level,
    :math:`m_j = 1`: the longer ago, the coarser. A uniform one keeps all details that the coarsest approximation
    consists of, :math:`m_J = 1, m_{J-1} = k, m_j = 2 (m_{j+1} - 1) + k`, from the coarsest level down until
    `memory_size` coefficients are kept.

    Args:
        channels: channels C.
        kernel_size: k; 2 and 4 are usual.
        length: steps over which the memory should reach; sets the number of levels J.
        memory_size: coefficients that a uniform memory keeps, or None for a fading memory.
        wavelet: start with Daubechies' wavelet of k taps (2 is Haar's) instead of uniform noise.
        device, dtype: of the parameters.

    Shapes:
        - input and output: :math:`(N, C, L)` with any L

    Raises:
        ValueError: if a size is too small, or there is no wavelet with `kernel_size` taps.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 2,
        length: int = 1024,
        *,
        memory_size: int | None = None,
        wavelet: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if kernel_size < 2 or length < 2:
            raise ValueError(f"kernel_size and length must be at least 2: got {kernel_size} and {length}")
        if memory_size is not None and memory_size < 2:
            raise ValueError(f"memory_size must be at least 2: got {memory_size}")
        if wavelet and kernel_size not in _WAVELETS:
            raise ValueError(f"wavelet needs kernel_size 2 or 4: got {kernel_size}")
        self.depth = multires_depth(length, kernel_size)
        self.wavelet = wavelet
        # Of level j + 1 at place j.
        self.taps = self._uniform_taps(kernel_size, memory_size) if memory_size else [1] * self.depth
        self.filters = nn.Parameter(torch.empty(channels, 2, kernel_size, device=device, dtype=dtype))
        self.weight = nn.Parameter(torch.empty(channels, 2 + sum(self.taps), device=device, dtype=dtype))
        self.reset_parameters()

    def _uniform_taps(self, kernel_size: int, memory_size: int) -> list[int]:
        taps, wanted, left = [], 1, memory_size - 1
        for _ in range(self.depth):
            taps.append(min(wanted, left))
            left -= taps[-1]
            wanted = 2 * (wanted - 1) + kernel_size
        return taps[::-1]

    def reset_parameters(self) -> None:
        """Draw new weights; filters are those of the wavelet if there is one."""
        k = self.filters.shape[2]
        if self.wavelet:
            low = torch.tensor(_WAVELETS[k], dtype=torch.float64)
            high = low.flip(0) * torch.tensor([-1.0, 1.0] * (k // 2), dtype=torch.float64)
            with torch.no_grad():
                self.filters.copy_(torch.stack([low, high]))
        else:
            nn.init.uniform_(self.filters, -(k**-0.5), k**-0.5)
        nn.init.uniform_(self.weight, -(self.weight.shape[1] ** -0.5), self.weight.shape[1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve all steps at once."""
        direct, coarsest, *details = self.weight.split([1, 1, *self.taps], 1)
        y, a = direct * x, x
        for level, weight in enumerate(details):
            # Details that nobody keeps are not computed.
            filters = self.filters if weight.shape[1] else self.filters[:, :1]
            both = _dilated(a, filters, 2**level).unflatten(1, (-1, filters.shape[1]))
            a = both[:, :, 0]
            if weight.shape[1]:
                y = y + _dilated(both[:, :, 1], weight[:, None], 2 ** (level + 1))
        return y + coarsest * a

    def initial_state(self, batch: int = 1) -> MultiresState:
        """Return the state before the first step of `batch` sequences."""
        like = self.weight.new_empty(batch, self.weight.shape[0])
        low = [_DelayLine(like, self.filters.shape[2], 2**j) for j in range(self.depth)]
        high = [_DelayLine(like, max(m, 1), 2 ** (j + 1)) for j, m in enumerate(self.taps)]
        return MultiresState(low, high)

    @torch.no_grad()
    def step(self, x: Tensor, state: MultiresState) -> Tensor:
        """Return the output (N, C) for the next step's input (N, C) and update `state`; takes O(J k) time."""
        direct, coarsest, *details = self.weight.split([1, 1, *self.taps], 1)
        y, a = direct[:, 0] * x, x
        for weight, low, high in zip(details, state.low, state.high, strict=True):
            a, b = torch.einsum("nck,cfk->fnc", low.push(a), self.filters)
            y = y + (high.push(b)[..., : weight.shape[1]] * weight).sum(-1)
        return y + coarsest[:, 0] * a


def _dilated(x: Tensor, filters: Tensor, dilation: int) -> Tensor:
    """Return (N, C F, L), the causal convolutions of (N, C, L) with filters (C, F, k), newest sample first."""
    if filters.shape[1:] == (1, 1):
        return x * filters[:, 0]
    padded = F.pad(x, (dilation * (filters.shape[2] - 1), 0))
    return depthwise_conv(padded, filters.flip(2).flatten(0, 1)[:, None], dilation=dilation)


CASES = (
    Case(
        MultiresConv,
        {"channels": 3, "kernel_size": 2, "length": 12},
        inputs=((2, 3, 11),),
        output=(2, 3, 11),
        vary=(0, 2),
        minimal=(1, 3, 1),
        raises=(
            Raises(
                ValueError,
                "kernel_size and length must be at least 2: got 1 and 12",
                {"kernel_size": 1},
            ),
            Raises(ValueError, "memory_size must be at least 2: got 1", {"memory_size": 1}),
            Raises(
                ValueError, "wavelet needs kernel_size 2 or 4: got 3", {"kernel_size": 3, "wavelet": True}
            ),
        ),
    ),
    Case(
        MultiresConv,
        {"channels": 3, "kernel_size": 3, "length": 30, "memory_size": 7},
        inputs=((2, 3, 13),),
        output=(2, 3, 13),
        id="uniform",
        vary=(0, 2),
        minimal=(1, 3, 1),
    ),
    Case(
        MultiresConv,
        {"channels": 3, "kernel_size": 4, "length": 20, "wavelet": True},
        inputs=((2, 3, 9),),
        output=(2, 3, 9),
        id="wavelet",
        vary=(0, 2),
        minimal=(1, 3, 1),
    ),
)
