"""Window attention: every pixel attends to the pixels of its own window; shifted windows join what others part.

Paper: Liu et al., Swin Transformer, https://arxiv.org/abs/2103.14030. Maps of any size work: the last windows are
filled up, and what fills them is not attended to, as pixels that only the shift brought together are not.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.cases import Case, Raises

__all__ = ["WindowAttention"]


class WindowAttention(nn.Module):
    r"""Multi-head attention within windows, of `Swin Transformer <https://arxiv.org/abs/2103.14030>`_.

    .. math:: y_i = W_o \sum_{j \in W(i)} \mathrm{softmax}_j \Big( \frac{q_i \cdot k_j}{\sqrt{d}} +
        b_{\Delta y, \Delta x} \Big)\, v_j

    Args:
        channels: C of the input.
        out_channels: of the output; C by default.
        num_heads: heads.
        head_dim: d; C / num_heads by default.
        window_size: pixels along a side of a window.
        shift: by how many pixels windows are moved down and to the right.
        shared_bias: one table b for all heads instead of one each.
        qkv_bias: add a bias to queries, keys and values.
        device, dtype: of the parameters.

    Shapes:
        - input: :math:`(N, C, H, W)`
        - output: :math:`(N, C', H, W)`

    Raises:
        ValueError: if `num_heads` does not divide the channels, or `shift` is not within the window.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        *,
        num_heads: int = 8,
        head_dim: int | None = None,
        window_size: int = 7,
        shift: int = 0,
        shared_bias: bool = False,
        qkv_bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if head_dim is None and channels % num_heads:
            raise ValueError(f"num_heads must divide channels: got {num_heads} and {channels}")
        if not 0 <= shift < window_size:
            raise ValueError(f"shift must lie in [0, {window_size}): got {shift}")
        self.num_heads, self.window_size, self.shift = num_heads, window_size, shift
        inner = num_heads * (channels // num_heads if head_dim is None else head_dim)
        self.q = nn.Conv2d(channels, inner, 1, bias=qkv_bias, device=device, dtype=dtype)
        self.kv = nn.Conv2d(channels, 2 * inner, 1, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Conv2d(inner, out_channels or channels, 1, device=device, dtype=dtype)
        table = (2 * window_size - 1,) * 2
        shape = table if shared_bias else (num_heads, *table)
        self.bias = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights."""
        for conv in (self.q, self.kv, self.proj):
            conv.reset_parameters()
        nn.init.trunc_normal_(self.bias, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Let every pixel attend to its window."""
        batch, _, height, width = x.shape
        size, heads = self.window_size, self.num_heads
        rows, columns = -(-height // size), -(-width // size)
        fill = (0, columns * size - width, 0, rows * size - height)

        def windows(y: Tensor) -> Tensor:
            y = F.pad(y, fill).roll((-self.shift, -self.shift), (2, 3))
            y = y.reshape(batch, heads, -1, rows, size, columns, size)
            return y.permute(0, 3, 5, 1, 4, 6, 2).reshape(batch, rows * columns, heads, size**2, -1)

        q, (k, v) = windows(self.q(x)), map(windows, self.kv(x).chunk(2, 1))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self._mask(rows, columns, height, width))
        y = y.reshape(batch, rows, columns, heads, size, size, -1).permute(0, 1, 4, 2, 5, 3, 6)
        y = y.reshape(batch, rows * size, columns * size, -1).roll((self.shift, self.shift), (1, 2))
        # Slices would tie a compiled program to sizes that need them, or to those that do not.
        y = F.pad(y, (0, 0, 0, width - columns * size, 0, height - rows * size))
        return self.proj(y.permute(0, 3, 1, 2))

    def _mask(self, rows: int, columns: int, height: int, width: int) -> Tensor:
        """Return the logits' bias (windows, heads, queries, keys), minus infinity between parts that never met."""
        size = self.window_size
        down, across = (self._parts(count, length) for count, length in ((rows, height), (columns, width)))
        parts = (4 * down[:, None, :, None] + across[None, :, None, :]).reshape(rows * columns, 1, -1)
        offsets = torch.arange(size, device=self.bias.device)
        offsets = offsets - offsets[:, None] + size - 1
        bias = self.bias[..., offsets[:, None, :, None], offsets[None, :, None, :]]
        bias = bias.flatten(-2).flatten(-3, -2)
        together = parts[..., :, None] == parts[..., None, :]
        return torch.where(together, bias, -torch.inf)

    def _parts(self, count: int, length: int) -> Tensor:
        """Return, for every place along one side of the windows, what it belongs to.

        The fill is one part; what the shift carried from the beginning to the end is another.
        """
        place = torch.arange(count * self.window_size, device=self.bias.device)
        carried = place >= count * self.window_size - self.shift
        filled = (place + self.shift) % (count * self.window_size) >= length
        return (carried + 2 * filled).view(count, self.window_size)


CASES = (
    Case(
        WindowAttention, {"channels": 6, "num_heads": 2, "window_size": 4, "shift": 2},
        ((2, 6, 7, 9),), (2, 6, 7, 9), id="shifted", minimal=(1, 6, 1, 1),
        raises=(
            Raises(ValueError, "num_heads must divide channels: got 4 and 6", {"num_heads": 4}),
            Raises(ValueError, "shift must lie in [0, 4): got 4", {"shift": 4}),
        ),
    ),
    Case(
        WindowAttention,
        {
            "channels": 4, "out_channels": 8, "num_heads": 3, "head_dim": 2, "window_size": 3,
            "shared_bias": True, "qkv_bias": False,
        },
        ((2, 4, 5, 6),), (2, 8, 5, 6), minimal=(1, 4, 1, 1),
    ),
)  # fmt: skip
