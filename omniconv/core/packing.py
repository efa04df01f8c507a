"""Tensors with many zeros as one bit an entry and the other values, without losing a bit.

An entry counts as zero when all of its bits are zero, so a negative zero, a NaN and every dtype come back as
they were.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["pack", "stored_bytes", "unpack"]

# What two more entries in the JSON header of a weight file cost, about.
_OVERHEAD = 256


def _nonzero(flat: Tensor) -> Tensor:
    """Return which entries of a contiguous 1-d tensor hold a bit that is set."""
    return (flat.view(torch.uint8).reshape(len(flat), flat.element_size()) != 0).any(1)


def _packed_bytes(entries: int, nonzero: int, size: int) -> int:
    return math.ceil(entries / 8) + nonzero * size + _OVERHEAD


def stored_bytes(tensor: Tensor) -> int:
    """Return the bytes of `tensor` in a packed weight file: plain or packed, whichever is smaller."""
    plain = tensor.numel() * tensor.element_size()
    if plain <= _OVERHEAD or tensor.is_meta:
        return plain
    nonzero = int(_nonzero(tensor.detach().cpu().reshape(-1)).sum())
    return min(plain, _packed_bytes(tensor.numel(), nonzero, tensor.element_size()))


def pack(tensor: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return (mask, values) of a tensor, or None where they would not be smaller than the tensor itself.

    Args:
        tensor: of any shape and dtype, on the CPU.

    Returns:
        `mask`, uint8 (ceil(entries / 8),): bit i % 8 of byte i // 8, the lowest bit first, tells whether
        entry i in row-major order is not zero; `values`: those entries in order, in the tensor's dtype.
    """
    flat = tensor.detach().reshape(-1).contiguous()
    size = flat.element_size()
    if flat.numel() * size <= _OVERHEAD:
        return None
    nonzero = _nonzero(flat)
    if _packed_bytes(flat.numel(), int(nonzero.sum()), size) >= flat.numel() * size:
        return None
    mask = torch.from_numpy(np.packbits(nonzero.numpy(), bitorder="little"))
    # Picked as bytes, because not every dtype that can be stored can also be indexed.
    values = flat.view(torch.uint8).reshape(-1, size)[nonzero].reshape(-1).view(flat.dtype)
    return mask, values


def unpack(mask: Tensor, values: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the tensor of `shape` that `pack` made (mask, values) of.

    Raises:
        ValueError: if the three do not belong together.
    """
    entries = math.prod(shape)
    if mask.dtype != torch.uint8 or mask.ndim != 1 or values.ndim != 1 or len(mask) != math.ceil(entries / 8):
        raise ValueError(
            f"a mask of {entries} entries is {math.ceil(entries / 8)} bytes: got {tuple(mask.shape)}"
        )
    bits = torch.from_numpy(np.unpackbits(mask.numpy(), bitorder="little")).bool()
    if bits[entries:].any() or int(bits.sum()) != len(values):
        raise ValueError(f"the mask marks {int(bits.sum())} values: got {len(values)}")
    size = values.element_size()
    flat = torch.zeros(entries, size, dtype=torch.uint8)
    flat[bits[:entries]] = values.contiguous().view(torch.uint8).reshape(-1, size)
    return flat.reshape(-1).view(values.dtype).reshape(tuple(shape))
