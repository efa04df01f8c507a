"""Halo attention: the queries of a block share one window of keys and values, larger than the block by a halo.

Paper: Vaswani et al., Scaling Local Self-Attention for Parameter Efficient Visual Backbones,
https://arxiv.org/abs/2103.12731. Parameter names are those of the public weights. Maps of any size work: what the
last blocks lack is zeros, as the paper has them beyond the border.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.cases import Case, Raises

__all__ = ["HaloAttention", "halo_windows"]

_PAIRS = 2**20
"""Pairs of query and key that are compared at a time."""


def halo_windows(x: Tensor, block_size: int, halo_size: int) -> Tensor:
    """Return every block's window, (N, C, rows, columns, window, window), of a map whose sides are whole blocks.

    Neighbouring windows overlap by twice the halo; the result is a view of the map padded with zeros.
    """
    window = block_size + 2 * halo_size
    padded = F.pad(x, (halo_size,) * 4)
    return padded.unfold(2, window, block_size).unfold(3, window, block_size)


class RelativePosition(nn.Module):
    r"""Logits from the offsets between queries and keys: :math:`q \cdot (r_{\Delta y} + r_{\Delta x})`.

    Args:
        queries: queries along a side of the block.
        window: keys along a side of the window.
        head_dim: channels of a query.
        step: pixels from one query to the next.
        device, dtype: of the parameters.
    """

    def __init__(
        self, queries: int, window: int, head_dim: int, step: int, *, device=None, dtype=None
    ) -> None:
        super().__init__()
        self.queries, self.window, self.step = queries, window, step
        size = (2 * window - 1, head_dim)
        self.height_rel = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.width_rel = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new embeddings."""
        for table in (self.height_rel, self.width_rel):
            nn.init.trunc_normal_(table, std=table.shape[1] ** -0.5)

    def forward(self, q: Tensor) -> Tensor:
        """Return logits (..., queries^2, window^2) of queries (..., queries^2, head_dim)."""
        keys = torch.arange(self.window, device=q.device)
        rows = torch.arange(self.queries, device=q.device) * self.step
        offsets = keys - rows[:, None] + self.window - 1
        q = q.unflatten(-2, (self.queries, self.queries))
        down = torch.einsum("...yxd,ykd->...yxk", q, self.height_rel[offsets])
        across = torch.einsum("...yxd,xkd->...yxk", q, self.width_rel[offsets])
        return (down[..., :, None] + across[..., None, :]).flatten(-2).flatten(-3, -2)


class HaloAttention(nn.Module):
    r"""Blocked local self-attention of `HaloNet <https://arxiv.org/abs/2103.12731>`_.

    .. math:: y_i = \sum_{j \in W(i)} \mathrm{softmax}_j \Big( \frac{q_i \cdot k_j}{\sqrt{d}} +
        q_i \cdot (r_{\Delta y} + r_{\Delta x}) \Big)\, v_j

    where W(i) is the block of i with `halo_size` pixels around it, and zeros beyond the border take part. A window
    of b + 2h pixels along a side serves b x b queries, so that keys are gathered :math:`(b + 2h)^2 / b^2` times
    instead of once a query. With a stride, every other query is left out, and nothing else changes.

    Args:
        channels: C of the input.
        out_channels: of the output, the values of all heads together; C by default.
        num_heads: heads.
        head_dim: d, channels of a head's queries and keys; C / num_heads by default.
        block_size: b, pixels along a side.
        halo_size: h.
        stride: of the queries.
        query_step: by how many pixels of relative position a query is off the one before it; their true distance,
            `stride`, by default. The public weights count 1 at any stride.
        device, dtype: of the parameters.

    Shapes:
        - input: :math:`(N, C, H, W)`
        - output: :math:`(N, C', \lceil H / s \rceil, \lceil W / s \rceil)`

    Raises:
        ValueError: if `num_heads` does not divide the channels, or `stride` not `block_size`.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        *,
        num_heads: int = 8,
        head_dim: int | None = None,
        block_size: int = 8,
        halo_size: int = 3,
        stride: int = 1,
        query_step: int | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        values = channels if out_channels is None else out_channels
        if values % num_heads or (head_dim is None and channels % num_heads):
            raise ValueError(f"num_heads must divide the channels: got {num_heads}, {channels} and {values}")
        if block_size % stride:
            raise ValueError(f"stride must divide block_size: got {stride} and {block_size}")
        dim = channels // num_heads if head_dim is None else head_dim
        self.num_heads, self.head_dim, self.block_size, self.halo_size = num_heads, dim, block_size, halo_size
        self.stride = stride
        keys = num_heads * dim
        self.q = nn.Conv2d(channels, keys, 1, stride, bias=False, device=device, dtype=dtype)
        self.kv = nn.Conv2d(channels, keys + values, 1, bias=False, device=device, dtype=dtype)
        self.pos_embed = RelativePosition(
            block_size // stride,
            block_size + 2 * halo_size,
            dim,
            stride if query_step is None else query_step,
            device=device,
            dtype=dtype,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights."""
        for conv in (self.q, self.kv):
            nn.init.trunc_normal_(conv.weight, std=conv.in_channels**-0.5)
        self.pos_embed.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Let every query attend to its block's window."""
        batch, _, height, width = x.shape
        block, heads = self.block_size, self.num_heads
        side = block // self.stride
        rows, columns = -(-height // block), -(-width // block)
        q, kv = self.q(x), self.kv(x)
        q_height, q_width = q.shape[2:]
        q = F.pad(q, (0, columns * side - q_width, 0, rows * side - q_height))
        kv = F.pad(kv, (0, columns * block - width, 0, rows * block - height))

        q = q.reshape(batch, heads, self.head_dim, rows, side, columns, side).permute(0, 3, 5, 1, 4, 6, 2)
        # Heads come first and split into keys and values, as the public weights have them.
        windows = (
            halo_windows(kv, block, self.halo_size).unflatten(1, (heads, -1)).permute(0, 3, 4, 1, 5, 6, 2)
        )
        parts = [(q, windows)]
        if not torch.compiler.is_compiling():
            # A few rows of blocks at a time, for memory that is used again is fast memory.
            pairs = batch * columns * heads * (side * (block + 2 * self.halo_size)) ** 2
            count = max(1, _PAIRS // max(1, pairs))
            parts = list(zip(q.split(count, 1), windows.split(count, 1), strict=True))
        y = torch.cat([self._attend(*part) for part in parts], 1)
        y = y.reshape(batch, rows * side, columns * side, -1)
        # Slices would tie a compiled program to sizes that need them, or to those that do not.
        y = F.pad(y, (0, 0, 0, q_width - columns * side, 0, q_height - rows * side))
        return y.permute(0, 3, 1, 2)

    def _attend(self, q: Tensor, windows: Tensor) -> Tensor:
        """Return values (N, rows, side, columns, side, heads, D) of queries (N, rows, columns, heads, ..., d)."""
        batch, rows, columns, heads, side, _, dim = q.shape
        q = q.reshape(batch * rows * columns, heads, side**2, dim)
        windows = windows.reshape(batch * rows * columns, heads, -1, windows.shape[-1])
        k, v = windows.split((dim, windows.shape[-1] - dim), dim=-1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.pos_embed(q))
        return y.reshape(batch, rows, columns, heads, side, side, -1).permute(0, 1, 4, 2, 5, 3, 6)


CASES = (
    Case(
        HaloAttention, {"channels": 8, "num_heads": 2, "block_size": 4, "halo_size": 1},
        ((2, 8, 7, 10),), (2, 8, 7, 10), minimal=(1, 8, 1, 1),
        raises=(
            Raises(ValueError, "num_heads must divide the channels: got 3, 8 and 8", {"num_heads": 3}),
            Raises(ValueError, "stride must divide block_size: got 3 and 4", {"stride": 3}),
        ),
    ),
    Case(
        HaloAttention,
        {"channels": 6, "out_channels": 8, "num_heads": 2, "head_dim": 5, "block_size": 4, "halo_size": 2, "stride": 2},
        ((2, 6, 9, 11),), (2, 8, 5, 6), id="strided", minimal=(1, 6, 1, 1),
    ),
)  # fmt: skip
