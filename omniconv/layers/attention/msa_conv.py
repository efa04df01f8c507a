"""MSA-Conv: self-attention inside the window of a convolution, one window for every pixel.

Paper: Zhang et al., TiC: Exploring Vision Transformer in Convolution, https://arxiv.org/abs/2310.04134. Parameter names
are those of the official code, whose layer has one head and a ReLU behind it, which here is the network's. As there,
zeros beyond the border are keys like others.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.cases import Case, Raises

__all__ = ["MSAConv2d"]

_DIRECTIONS = ((0, 0), (0, 1), (1, 0), (0, -1), (-1, 0))


class MSAConv2d(nn.Module):
    r"""Attention of `TiC <https://arxiv.org/abs/2310.04134>`_ within every pixel's window, and a convolution.

    .. math:: y = w * \Big( x + \sum_\delta \mathrm{softmax}_\delta
        \Big(\frac{q(i) \cdot k(i + \delta)}{\sqrt{d}}\Big)\, v(i + \delta) \Big)

    where q, k and v are 1x1 convolutions of x and the offsets are those of a K x K kernel. Two extensions let distant
    pixels meet: heads whose keys and values are rolled around the map in different directions, and keys and values
    pooled from the whole map that join every window.

    Args:
        channels: C of the input.
        out_channels: of the output; C by default.
        kernel_size: K, odd.
        num_heads: heads; as many as channels make the depthwise form.
        stride: of the convolution w.
        dilation: pixels between neighbours in the window.
        groups: of the convolution w.
        shift: by how many pixels heads are rolled: the first stays, the next four go right, down, left and up.
        pool: pixels along a side of the pooled map that joins every window; 0 for none.
        padding_mode: "zeros" or "circular", of windows and convolution.
        device, dtype: of the parameters.

    Shapes:
        - input: :math:`(N, C, H, W)`
        - output: :math:`(N, C', \lceil H / s \rceil, \lceil W / s \rceil)`

    Raises:
        ValueError: if `kernel_size` is even or `num_heads` does not divide `channels`.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        kernel_size: int = 3,
        *,
        num_heads: int = 1,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        shift: int = 0,
        pool: int = 0,
        padding_mode: Literal["zeros", "circular"] = "zeros",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd: got {kernel_size}")
        if channels % num_heads:
            raise ValueError(f"num_heads must divide channels: got {num_heads} and {channels}")
        self.kernel_size, self.num_heads, self.dilation = kernel_size, num_heads, dilation
        self.shift, self.pool, self.padding_mode = shift, pool, padding_mode
        self.qkv_conv = nn.Conv2d(channels, 3 * channels, 1, device=device, dtype=dtype)
        self.mlp = nn.Conv2d(
            channels,
            channels if out_channels is None else out_channels,
            kernel_size,
            stride,
            kernel_size // 2,
            groups=groups,
            bias=False,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )

    def reset_parameters(self) -> None:
        """Draw new weights."""
        self.qkv_conv.reset_parameters()
        self.mlp.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Attend, add and convolve."""
        return self.mlp(x + self.attend(x))

    def attend(self, x: Tensor) -> Tensor:
        """Return the weighted sums of values (N, C, H, W) alone."""
        heads, (height, width) = self.num_heads, x.shape[2:]
        q, k, v = (part.unflatten(1, (heads, -1)) for part in self.qkv_conv(x).chunk(3, 1))
        q = q * q.shape[2] ** -0.5
        near_k, near_v = (self._padded(self._rolled(part)) for part in (k, v))
        places = range(0, self.kernel_size * self.dilation, self.dilation)
        windows = [(..., slice(i, i + height), slice(j, j + width)) for i in places for j in places]
        logits = torch.stack([(q * near_k[at]).sum(2) for at in windows], 2)
        far_v: Tensor | None = None
        if self.pool:
            far_k, far_v = (self._pooled(part) for part in (k, v))
            logits = torch.cat([logits, torch.einsum("ngdyx,ngdt->ngtyx", q, far_k)], 2)
        share = logits.softmax(2)
        y = share[:, :, 0, None] * near_v[windows[0]]
        for tap, at in enumerate(windows[1:], 1):
            y = y + share[:, :, tap, None] * near_v[at]
        if far_v is not None:
            y = y + torch.einsum("ngtyx,ngdt->ngdyx", share[:, :, len(windows) :], far_v)
        return y.flatten(1, 2)

    def _padded(self, x: Tensor) -> Tensor:
        """Return (N, heads, d, H, W) with room for the windows of the pixels at the border."""
        mode = "constant" if self.padding_mode == "zeros" else "circular"
        margin = (self.kernel_size // 2 * self.dilation,) * 4
        return F.pad(x.flatten(1, 2), margin, mode=mode).unflatten(1, (self.num_heads, -1))

    def _pooled(self, x: Tensor) -> Tensor:
        """Return (N, heads, d, pool^2), the means of (N, heads, d, H, W) over the parts of a coarse grid."""
        pooled = F.adaptive_avg_pool2d(x.flatten(1, 2), self.pool)
        return pooled.flatten(2).unflatten(1, (self.num_heads, -1))

    def _rolled(self, x: Tensor) -> Tensor:
        """Return (N, heads, d, H, W) with every head rolled in its direction."""
        if not self.shift:
            return x
        steps = [_DIRECTIONS[head % len(_DIRECTIONS)] for head in range(self.num_heads)]
        return torch.stack(
            [
                x[:, head].roll((self.shift * down, self.shift * right), (2, 3))
                for head, (down, right) in enumerate(steps)
            ],
            1,
        )


CASES = (
    Case(
        MSAConv2d, {"channels": 6, "num_heads": 2, "dilation": 2}, ((2, 6, 7, 5),), (2, 6, 7, 5),
        minimal=(1, 6, 1, 1),
        raises=(
            Raises(ValueError, "kernel_size must be odd: got 2", {"kernel_size": 2}),
            Raises(ValueError, "num_heads must divide channels: got 4 and 6", {"num_heads": 4}),
        ),
    ),
    Case(
        MSAConv2d,
        {
            "channels": 4, "out_channels": 8, "kernel_size": 1, "num_heads": 2, "stride": 2, "groups": 4,
            "shift": 2, "pool": 2,
        },
        ((2, 4, 7, 6),), (2, 8, 4, 3), id="far",
    ),
)  # fmt: skip
