"""Feature rows gathered from a table in host memory, and how many memory requests that takes a GPU.

Paper: Min et al., Large Graph Convolutional Network Training with GPU-Oriented Data Communication Architecture
(PyTorch-Direct), https://arxiv.org/abs/2103.03330. There a kernel reads pinned host rows over the bus, 128 bytes a
request at best; which lane of a warp reads which element decides how many requests a row takes.
"""

from typing import Literal

import torch
from torch import Tensor

__all__ = ["Order", "count_requests", "gather_host"]

Order = Literal["plain", "shifted", "aligned"]
_LINE = 128
_WARP = 32


def gather_host(table: Tensor, index: Tensor, *, device: torch.device | str | None = None) -> Tensor:
    """Return the rows `table[index]` of a table in host memory as a dense batch on a device.

    For a CUDA device the rows are gathered into pinned memory and copied while the host goes on.

    Args:
        table: `(M, *)`, on the CPU.
        index: rows, (B,), integers, on the CPU.
        device: where the batch goes; by default the CPU.

    Returns:
        `(B, *)`.

    Raises:
        ValueError: if the table is not in host memory, or the index is not a list of rows.
    """
    if table.device.type != "cpu":
        raise ValueError(f"table must be in host memory: got one on {table.device}; take table[index]")
    if index.ndim != 1 or index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"index must be (B,) of int32 or int64: got {tuple(index.shape)} {index.dtype}")
    target = torch.device("cpu" if device is None else device)
    if target.type == "cpu":
        return table.index_select(0, index)
    shape = (index.shape[0], *table.shape[1:])
    batch = torch.empty(shape, dtype=table.dtype, pin_memory=target.type == "cuda")
    torch.index_select(table, 0, index, out=batch)
    return batch.to(target, non_blocking=True)


def count_requests(
    index: Tensor, width: int, item_bytes: int, *, order: Order = "plain", start: int = 0
) -> int:
    """Return how many 128-byte requests a GPU makes to gather rows, by the model of the paper.

    Warps of 32 lanes read a row, a lane one element at a time, and a warp makes one request for each aligned stretch
    of 128 bytes that its lanes touch.

    Args:
        index: rows, (B,).
        width: elements in a row.
        item_bytes: bytes of an element, a divisor of 128.
        order: "plain": lane i of the row reads element i. "shifted", as the paper: lanes begin at the first element
            that starts an aligned stretch and go around the row's end. "aligned": they begin at the stretch in
            which the row begins, those before the row idle.
        start: address of the table in bytes, a multiple of `item_bytes`.

    Raises:
        ValueError: if elements do not fill stretches evenly, or `order` is unknown.
    """
    if _LINE % item_bytes or start % item_bytes:
        raise ValueError(f"item_bytes must divide 128 and start: got {item_bytes} and {start}")
    if order not in ("plain", "shifted", "aligned"):
        raise ValueError(f"order must be 'plain', 'shifted' or 'aligned': got {order!r}")
    line = _LINE // item_bytes
    # Rows that begin equally far into a stretch make equally many requests.
    before, rows = ((start // item_bytes + index.long() * width) % line).unique(return_counts=True)
    total = 0
    for offset, count in zip(before.tolist(), rows.tolist(), strict=True):
        if order == "aligned":
            element = torch.arange(-offset, width)
        else:
            shift = -offset % line if order == "shifted" else 0
            element = (torch.arange(width) + shift) % width
        warp = torch.arange(len(element)) // _WARP
        touched = torch.stack([warp, (offset + element) // line], 1)[element >= 0]
        total += count * len(touched.unique(dim=0))
    return total
