"""HyperZ.Z.W: slow networks of coordinates make hyper-kernels, which the features turn into kernels of their own.

Paper: Zhang, HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction,
https://arxiv.org/abs/2401.17948. The paper leaves sizes and several formulas open and there is no code; what was
decided here is listed under `deviations` of its record.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.cases import Case, Raises
from omniconv.ops.depthwise_conv.api import depthwise_conv

__all__ = ["SlowFastBlock", "global_hyperzzw", "local_hyperzzw"]

_POOL = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d}


def _standardise(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Return every channel of every sample with zero mean and unit variance."""
    axes = tuple(range(2, x.ndim))
    centred = x - x.mean(axes, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + eps)


def _to_square(x: Tensor) -> Tensor:
    """Return (N, C, H, W) with zeros added until H = W, or (N, C, L) in rows of a square."""
    if x.ndim == 4:
        side = max(x.shape[2:])
        return F.pad(x, (0, side - x.shape[3], 0, side - x.shape[2]))
    # Counted, for `torch.compile` knows no integer roots.
    side = 1
    while side**2 < x.shape[2]:
        side += 1
    return F.pad(x, (0, side**2 - x.shape[2])).unflatten(2, (side, side))


def global_hyperzzw(x: Tensor, mixed: Tensor, kernel: Tensor) -> Tensor:
    r"""Return the matrix products of context kernels and a mixed copy of what made them.

    .. math:: Y_{nc} = (W_c \odot X_{nc})\, M_{nc}

    for every channel c of every sample n. Maps that are not square are filled up with zeros for the product;
    sequences are laid out in the rows of a square.

    Args:
        x: features X.
        mixed: M, the features after a mixing of their channels.
        kernel: hyper-kernel W.

    Shapes:
        - x, mixed and output: :math:`(N, C, H, W)` or :math:`(N, C, L)`
        - kernel: :math:`(C, H, W)` or :math:`(C, L)`
    """
    product = _to_square(kernel * x) @ _to_square(mixed)
    return product.flatten(2)[..., : x.shape[2]] if x.ndim == 3 else product[..., : x.shape[2], : x.shape[3]]


def local_hyperzzw(x: Tensor, kernel: Tensor) -> Tensor:
    r"""Return a depthwise convolution of every sample with a kernel of its own.

    .. math:: Y_{nc} = \bigl(W_c \odot (1 + P(X_{nc}))\bigr) * X_{nc}

    where P averages the features over a grid of the kernel's size.

    Args:
        x: features X.
        kernel: hyper-kernel W, of odd size.

    Shapes:
        - x and output: :math:`(N, C, *S)` with one or two axes S
        - kernel: :math:`(C, *K)`
    """
    size = kernel.shape[1:]
    context = kernel * (1 + _POOL[len(size)](x, size))
    planes = x.flatten(0, 1)[None]
    y = depthwise_conv(planes, context.flatten(0, 1)[:, None], padding=[k // 2 for k in size])
    return y.reshape(x.shape)


def _draw(linear: nn.Module, std: float, bias: float) -> None:
    nn.init.normal_(linear.get_parameter("weight"), std=std)
    nn.init.uniform_(linear.get_parameter("bias"), -bias, bias)


class _SlowNetwork(nn.Module):
    r"""Multiplicative filter network of coordinates, whose output is a hyper-kernel.

    .. math:: h_1 = \sin(\Omega_1 c + \phi_1), \qquad h_{i+1} = (A_i h_i + b_i) \odot \sin(\Omega_{i+1} c + \phi_{i+1}),
              \qquad W = \frac{A h_n + b}{\sqrt{P}}

    with coordinates c from -1 to 1 along every axis and P the number of points of the grid.

    Args:
        axes: coordinates of a point.
        channels: kernels C.
        hidden: width of h.
        depth: number n of filters.
        frequency: how fast the filters vary: entries of the first n are drawn from a normal distribution of this scale.
        device, dtype: of the parameters.

    Shapes:
        - output: :math:`(C, *S)` for the sizes S it is called with
    """

    def __init__(
        self,
        axes: int,
        channels: int,
        hidden: int = 16,
        depth: int = 3,
        frequency: float = 6.0,
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.frequency = frequency
        self.filters = nn.ModuleList(nn.Linear(axes, hidden, **options) for _ in range(depth))
        self.layers = nn.ModuleList(nn.Linear(hidden, hidden, **options) for _ in range(depth - 1))
        self.out = nn.Linear(hidden, channels, **options)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights."""
        for linear in self.filters:
            _draw(linear, self.frequency, math.pi)
        # A product with a sine halves the variance.
        for linear in (*self.layers, self.out):
            _draw(linear, (2 / self.out.in_features) ** 0.5, 0.0)

    def forward(self, *sizes: int) -> Tensor:
        """Return hyper-kernels for maps of these sizes."""
        weight = self.out.weight
        lines = [torch.arange(1 - s, s, 2, device=weight.device) / max(s - 1, 1) for s in sizes]
        grid = torch.stack(torch.meshgrid(*lines, indexing="ij"), -1).to(weight.dtype)
        filters = [torch.sin(linear(grid)) for linear in self.filters]
        h = filters[0]
        for linear, g in zip(self.layers, filters[1:], strict=True):
            h = linear(h) * g
        return self.out(h).movedim(-1, 0) / math.sqrt(math.prod(sizes))


class SlowFastBlock(nn.Module):
    r"""Slow-fast neural encoding block: ten branches, standardised, joined and compressed; nothing is added to x.

    The branches are three global products :math:`G_i`, the gated features :math:`x \odot \sigma(G_1)`, the interaction
    :math:`G_2 \odot G_3`, four local convolutions of different sizes, and a gated unit
    :math:`f \odot x + (1 - f) \odot \tanh(B x), f = \sigma(A x)`. Each is standardised per sample. After the
    compression one half of the channels is standardised per sample and the other over the batch.

    Args:
        in_channels: channels C of the input.
        out_channels: channels C' of the output, even.
        axes: 1 for sequences, 2 for images.
        sizes: of the four local kernels, odd.
        dropout: share of the outputs that are zeroed.
        device, dtype: of the parameters.

    Shapes:
        - input: :math:`(N, C, H, W)` or :math:`(N, C, L)`
        - output: the same with C' channels

    Raises:
        ValueError: if `axes` is not 1 or 2, `out_channels` odd, or a size even.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        axes: int = 2,
        sizes: tuple[int, int, int, int] = (3, 5, 7, 9),
        dropout: float = 0.0,
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if axes not in (1, 2):
            raise ValueError(f"axes must be 1 or 2: got {axes}")
        if out_channels % 2:
            raise ValueError(f"out_channels must be even: got {out_channels}")
        if any(size % 2 == 0 for size in sizes):
            raise ValueError(f"sizes must be odd: got {sizes}")
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        conv = (nn.Conv1d, nn.Conv2d)[axes - 1]
        self.axes = axes
        self.sizes = tuple(sizes)
        self.slow = _SlowNetwork(axes, 3 * in_channels, **options)
        self.slow_local = nn.ModuleList(_SlowNetwork(axes, in_channels, **options) for _ in sizes)
        self.mix = conv(in_channels, 3 * in_channels, 1, **options)
        self.unit = conv(in_channels, 2 * in_channels, 1, **options)
        self.compress = conv(10 * in_channels, out_channels, 1, **options)
        self.batch_norm = nn.BatchNorm1d(out_channels // 2, affine=False, **options)
        self.dropout = nn.Dropout(dropout)

    def reset_parameters(self) -> None:
        """Draw new weights and forget the running statistics."""
        for module in (self.slow, *self.slow_local, self.mix, self.unit, self.compress, self.batch_norm):
            module.reset_parameters()  # pyright: ignore[reportCallIssue]

    def _branches(self, x: Tensor) -> list[Tensor]:
        kernels, mixed = self.slow(*x.shape[2:]).chunk(3), self.mix(x).chunk(3, 1)
        products = [global_hyperzzw(x, m, k) for m, k in zip(mixed, kernels, strict=True)]
        gate, new = self.unit(x).chunk(2, 1)
        gate = gate.sigmoid()
        local = [
            local_hyperzzw(x, slow(*[size] * self.axes))
            for size, slow in zip(self.sizes, self.slow_local, strict=True)
        ]
        # Standardised first, so that neither gate nor interaction depends on the size of the map.
        g1, g2, g3 = (_standardise(g) for g in products)
        return [g1, g2, g3, x * g1.sigmoid(), g2 * g3, *local, gate * x + (1 - gate) * new.tanh()]

    def forward(self, x: Tensor) -> Tensor:
        """Encode `x`."""
        y = self.compress(torch.cat([_standardise(branch) for branch in self._branches(x)], 1))
        first, second = y.chunk(2, 1)
        second = self.batch_norm(second.flatten(2)).reshape(second.shape)
        return self.dropout(F.gelu(torch.cat([_standardise(first), second], 1)))

    def slow_loss(self, y: Tensor) -> Tensor:
        """Return the local feedback for the slow network: how far its hyper-kernels are from the output `y`.

        Compared are the standardised means over channels, and over the batch for features, which get no gradient.
        """
        kernel = _standardise(self.slow(*y.shape[2:]).mean(0)[None, None])
        wanted = _standardise(y.detach().mean((0, 1))[None, None])
        return F.mse_loss(kernel, wanted)


CASES = (
    Case(
        SlowFastBlock,
        {"in_channels": 3, "out_channels": 4},
        inputs=((2, 3, 7, 5),),
        output=(2, 4, 7, 5),
        vary=(0,),
        minimal=(1, 3, 1, 1),
        channels_last=False,
        raises=(
            Raises(ValueError, "axes must be 1 or 2: got 3", {"axes": 3}),
            Raises(ValueError, "out_channels must be even: got 5", {"out_channels": 5}),
            Raises(ValueError, "sizes must be odd: got (3, 4, 5, 7)", {"sizes": (3, 4, 5, 7)}),
        ),
    ),
    Case(
        SlowFastBlock,
        {"in_channels": 3, "out_channels": 6, "axes": 1, "sizes": (3, 3, 5, 7), "dropout": 0.1},
        inputs=((2, 3, 11),),
        output=(2, 6, 11),
        id="1d",
        vary=(0,),
        minimal=(1, 3, 1),
    ),
)
