"""Codes of k bits, stored without a gap."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["pack_bits", "unpack_bits"]


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Return the codes one after another, each with its lowest bit first, as `ceil(n * bits / 8)` bytes.

    Args:
        codes: of any shape and whole dtype, from 0 to 2^bits - 1.
        bits: of a code, at most 16.
    """
    shifts = torch.arange(bits, device=codes.device)
    # A slice at a time, because every bit takes a byte in between.
    parts = [
        _to_bytes(((part[:, None].long() >> shifts) & 1).flatten()) for part in codes.flatten().split(1 << 20)
    ]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8, device=codes.device)


def _to_bytes(flags: Tensor) -> Tensor:
    flags = torch.nn.functional.pad(flags, (0, -len(flags) % 8)).reshape(-1, 8)
    return (flags << torch.arange(8, device=flags.device)).sum(1).to(torch.uint8)


def unpack_bits(packed: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """Return the codes of `shape`, int64, that `pack_bits` packed.

    Raises:
        ValueError: if `packed` has not the bytes of so many codes.
    """
    entries = math.prod(shape)
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (math.ceil(entries * bits / 8),):
        raise ValueError(
            f"{entries} codes of {bits} bits are {math.ceil(entries * bits / 8)} bytes: got {tuple(packed.shape)}"
        )
    shifts = torch.arange(bits, device=packed.device)
    # A multiple of eight codes is a whole number of bytes.
    parts = []
    for part in packed.split((1 << 20) // 8 * bits):
        flags = (part[:, None].long() >> torch.arange(8, device=packed.device)) & 1
        flags = flags.flatten()[: flags.numel() // bits * bits].reshape(-1, bits)
        parts.append((flags << shifts).sum(1))
    return (
        torch.cat(parts)[:entries].reshape(tuple(shape)) if parts else packed.new_zeros(tuple(shape)).long()
    )
