"""Recursive gated convolution: products of depthwise convolved parts, each time on twice the channels.

Paper: Rao et al., HorNet, https://arxiv.org/abs/2207.14284. Every product raises the order of the interaction between
pixels by one; since the early ones are narrow, order five costs hardly more than order two.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.cases import Case, Raises
from omniconv.layers.norm.layer_norm2d import LayerNorm2d

__all__ = ["GlobalLocalFilter", "RecursiveGatedConv2d"]


class GlobalLocalFilter(nn.Module):
    r"""Half of the channels through a 3x3 depthwise convolution, half through a learned filter of the whole map.

    .. math:: y = \mathrm{LN}[\, k * u_1,\; \mathcal{F}^{-1}(W \odot \mathcal{F} u_2)\,], \qquad u = \mathrm{LN}(x)

    from `HorNet <https://arxiv.org/abs/2207.14284>`_. The product of spectra is a circular convolution with a kernel
    as large as the map. W is resized bilinearly to the spectrum; the two halves' channels alternate in y. Transforms
    run in float32 at least.

    Args:
        channels: channels C, even.
        size: of the map (H, W) for which W holds one number a frequency.
        device, dtype: of the parameters.

    Shapes:
        - input and output: :math:`(N, C, H, W)`

    Raises:
        ValueError: if `channels` is odd.
    """

    def __init__(self, channels: int, size: tuple[int, int], *, device=None, dtype=None) -> None:
        super().__init__()
        if channels % 2:
            raise ValueError(f"channels must be even: got {channels}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        half = channels // 2
        self.dw = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False, **factory)
        # The last axis holds real and imaginary parts, as in the public weights.
        self.complex_weight = nn.Parameter(torch.empty(half, size[0], size[1] // 2 + 1, 2, **factory))
        self.pre_norm = LayerNorm2d(channels, **factory)
        self.post_norm = LayerNorm2d(channels, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights."""
        for module in (self.dw, self.pre_norm, self.post_norm):
            module.reset_parameters()
        nn.init.trunc_normal_(self.complex_weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Filter every channel of `x`."""
        x = self.pre_norm(x)
        local, whole = x.chunk(2, 1)
        exact = torch.promote_types(x.dtype, torch.float32)
        spectrum = torch.fft.rfft2(whole.to(exact), norm="ortho")
        weight = self.complex_weight.to(exact).permute(3, 0, 1, 2)
        weight = F.interpolate(weight, spectrum.shape[2:], mode="bilinear", align_corners=True)
        product = spectrum * torch.complex(weight[0], weight[1])
        whole = torch.fft.irfft2(product, x.shape[2:], norm="ortho").to(x.dtype)
        return self.post_norm(torch.stack((self.dw(local), whole), 2).flatten(1, 2))


class RecursiveGatedConv2d(nn.Module):
    r"""Recursive gated convolution of order n, from `HorNet <https://arxiv.org/abs/2207.14284>`_.

    .. math:: [\, p_0, q_0, \dots, q_{n-1} \,] = W_\mathrm{in} x, \qquad
              p_{k+1} = g_k(p_k) \odot s\, (f * q)_k, \qquad y = W_\mathrm{out}\, p_n

    with :math:`q_k` of :math:`C / 2^{n-1-k}` channels, one depthwise convolution f on all of them, and 1x1
    convolutions :math:`g_k` that double the channels (:math:`g_0` is the identity). Parameter names are those of the
    public weights.

    Args:
        channels: channels C, divisible by 2^(n-1).
        order: n, the number of products.
        kernel_size: of the depthwise convolution, odd.
        filter_size: size of the map for which f is a `GlobalLocalFilter` instead; None for a convolution.
        scale: s.
        device, dtype: of the parameters.

    Shapes:
        - input and output: :math:`(N, C, H, W)`

    Raises:
        ValueError: if `channels` cannot be halved often enough, or `kernel_size` is even.
    """

    def __init__(
        self,
        channels: int,
        order: int = 5,
        *,
        kernel_size: int = 7,
        filter_size: tuple[int, int] | None = None,
        scale: float = 1 / 3,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if order < 1 or channels % 2 ** (order - 1):
            raise ValueError(f"channels must be divisible by 2^(order - 1): got {channels} and order {order}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive: got {kernel_size}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.widths = [channels // 2**k for k in reversed(range(order))]
        self.scale = scale
        gates = sum(self.widths)
        self.proj_in = nn.Conv2d(channels, 2 * channels, 1, **factory)
        if filter_size is None:
            margin = kernel_size // 2
            self.dwconv = nn.Conv2d(gates, gates, kernel_size, padding=margin, groups=gates, **factory)
        else:
            self.dwconv = GlobalLocalFilter(gates, filter_size, **factory)
        self.proj_out = nn.Conv2d(channels, channels, 1, **factory)
        self.pws = nn.ModuleList(
            nn.Conv2d(narrow, wide, 1, **factory)
            for narrow, wide in zip(self.widths, self.widths[1:], strict=False)
        )

    def reset_parameters(self) -> None:
        """Draw new weights."""
        for module in (self.proj_in, self.dwconv, self.proj_out, *self.pws):
            assert isinstance(module, nn.Conv2d | GlobalLocalFilter)
            module.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Return the interaction of order n."""
        p, q = self.proj_in(x).split((self.widths[0], sum(self.widths)), 1)
        first, *others = (self.dwconv(q) * self.scale).split(self.widths, 1)
        p = p * first
        for widen, gate in zip(self.pws, others, strict=True):
            p = widen(p) * gate
        return self.proj_out(p)


CASES = (
    Case(
        GlobalLocalFilter,
        {"channels": 6, "size": (5, 4)},
        inputs=((2, 6, 7, 5),),
        output=(2, 6, 7, 5),
        minimal=(1, 6, 1, 1),
        raises=(Raises(ValueError, "channels must be even: got 5", {"channels": 5, "size": (4, 4)}),),
    ),
    Case(
        RecursiveGatedConv2d,
        {"channels": 8, "order": 3, "kernel_size": 5},
        inputs=((2, 8, 7, 5),),
        output=(2, 8, 7, 5),
        minimal=(1, 8, 1, 1),
        raises=(
            Raises(
                ValueError,
                "channels must be divisible by 2^(order - 1): got 12 and order 4",
                {"channels": 12, "order": 4},
            ),
            Raises(
                ValueError, "kernel_size must be odd and positive: got 4", {"channels": 8, "kernel_size": 4}
            ),
        ),
    ),
    Case(
        RecursiveGatedConv2d,
        {"channels": 4, "order": 2, "filter_size": (5, 6)},
        inputs=((2, 4, 5, 6),),
        output=(2, 4, 5, 6),
        id="global",
        minimal=(1, 4, 1, 1),
    ),
)
