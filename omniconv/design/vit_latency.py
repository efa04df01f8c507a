"""Latency of vision transformers of any widths, predicted from a table that is measured on this machine.

Paper: Yang et al., Global Vision Transformer Pruning with Hessian-Aware Saliency, https://arxiv.org/abs/2110.04869.
"""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from omniconv.layers.attention.self_attention import SelfAttention
from omniconv.models.image.vit import Block, Mlp, VisionTransformer

__all__ = ["LatencyTable", "head_widths"]


def head_widths(attention: SelfAttention) -> tuple[int, int]:
    """Return the features that a head has for queries and keys, and for values."""
    values = attention.proj.in_features
    return (attention.qkv.out_features - values) // (2 * attention.num_heads), values // attention.num_heads


class LatencyTable:
    """Predicts the seconds of a `VisionTransformer` by the widths of its blocks, from a table measured here.

    Attention is measured over embedding, heads, queries' and values' widths, the MLP over embedding and hidden units;
    what lies between is interpolated. What the network does besides grows with the embedding.

    Args:
        model: the network before it is pruned.
        input_shape: of one sample.
        batch: samples in a forward pass.
        repeats: of every measurement, of which the median counts.

    Raises:
        ValueError: if the model has blocks of another kind.
    """

    def __init__(
        self, model: VisionTransformer, input_shape: tuple[int, ...], *, batch: int = 1, repeats: int = 5
    ) -> None:
        model = copy.deepcopy(model).eval()
        x = torch.randn(batch, *input_shape)
        *attention, hidden = _block_widths(model.blocks[0])
        with torch.inference_mode():
            tokens = model.forward_features(x).shape[2]

        def seconds(branch: nn.Module, dim: int) -> float:
            # Normed and added, as on a residual branch.
            branch = nn.Sequential(nn.LayerNorm(dim), branch)
            return _time(lambda y: y + branch(y), torch.randn(batch, tokens, dim), repeats)

        self._attention = _table(attention, lambda dim, *sizes: seconds(_attention(dim, *sizes), dim))
        self._mlp = _table((attention[0], hidden), lambda dim, inner: seconds(Mlp(dim, inner), dim))
        self._rest = 0.0
        self._rest = max(0.0, _time(model, x, repeats) - self.predict(model)) / attention[0]

    def predict(self, model: nn.Module) -> float:
        """Return the seconds of a forward pass; weights are not looked at, and may lie on the meta device."""
        widths = [_block_widths(block) for block in cast(VisionTransformer, model).blocks]
        blocks = sum(float(self._attention(w[:4]) + self._mlp((w[0], w[4]))) for w in widths)
        return blocks + self._rest * widths[0][0]


def _block_widths(block: nn.Module) -> tuple[int, int, int, int, int]:
    """Return embedding, heads, width of queries and values, and hidden units."""
    if not isinstance(block, Block) or not isinstance(block.attn, SelfAttention):
        raise ValueError(f"LatencyTable knows the blocks of VisionTransformer, not {type(block).__name__}")
    queries, values = head_widths(block.attn)
    return block.attn.qkv.in_features, block.attn.num_heads, queries, values, block.mlp.fc1.out_features


def _table(widths: Sequence[int], measure: Callable[..., float]) -> Any:
    """Return an interpolation of `measure` between quarters of the widths."""
    from scipy.interpolate import RegularGridInterpolator

    grids = []
    for width in widths:
        sizes = sorted({max(1, round(width * share)) for share in (0.25, 0.5, 0.75, 1)})
        grids.append(sizes if len(sizes) > 1 else [width, width + 1])
    values = np.zeros([len(grid) for grid in grids])
    for place in np.ndindex(*values.shape):
        values[place] = measure(*(grid[i] for grid, i in zip(grids, place, strict=True)))
    beyond: Any = None  # goes on as the last piece does
    interpolate = RegularGridInterpolator(grids, values, bounds_error=False, fill_value=beyond)
    return lambda place: interpolate([place])[0]


def _attention(dim: int, heads: int, queries: int, values: int) -> SelfAttention:
    """Return an attention of these widths."""
    attention = SelfAttention(dim, 1)
    attention.num_heads = heads
    attention.qkv = nn.Linear(dim, heads * (2 * queries + values))
    attention.proj = nn.Linear(heads * values, dim)
    return attention


@torch.inference_mode()
def _time(call: Callable[[Tensor], Tensor], x: Tensor, repeats: int) -> float:
    """Return the median seconds of a call, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call(x)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
