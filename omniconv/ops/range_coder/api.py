"""Integers to bytes and back, with tables of integer frequencies that sender and receiver share.

Frequencies are integers that are made once and then stored: were they computed from probabilities on both sides, the
last bit of an exponential would decide whether a message can be read.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from omniconv.ops._numba import HAS_NUMBA
from omniconv.ops.range_coder import reference

__all__ = ["PRECISION", "CodingTables", "decode", "encode", "make_tables"]

PRECISION = 16
"""Frequencies are in units of 2^-16."""

_TOTAL = 1 << PRECISION
_SMALL = 1000  # symbols that are not worth a compiler's loading


@dataclass(frozen=True)
class CodingTables:
    """Frequencies of K tables, each of which covers a run of integers and has one more symbol for all others.

    Attributes:
        cdfs: (K, L) where each symbol begins, from 0, and 2^16 from each table's end on.
        sizes: (K,) symbols of each table, the last of which announces a number outside the run.
        lowest: (K,) first number of each run.
    """

    cdfs: np.ndarray
    sizes: np.ndarray
    lowest: np.ndarray

    def __post_init__(self) -> None:
        for name in ("cdfs", "sizes", "lowest"):
            object.__setattr__(self, name, np.ascontiguousarray(getattr(self, name), np.int64))
        ends = np.take_along_axis(self.cdfs, self.sizes[:, None], 1)
        steps = np.diff(self.cdfs, axis=1)
        inside = np.arange(steps.shape[1]) < self.sizes[:, None]
        if (self.cdfs[:, 0] != 0).any() or (ends != _TOTAL).any() or (steps[inside] < 1).any():
            raise ValueError(f"every cdf must rise from 0 to {_TOTAL}: make tables with make_tables")


def make_tables(probabilities: np.ndarray, lowest: int) -> CodingTables:
    """Return integer frequencies of probabilities; they sum to 2^16 exactly and none is zero.

    Args:
        probabilities: (K, L) of L consecutive integers; what is left to 1 belongs to all other integers. Ends below
            2^-16 are given to these.
        lowest: the first of the integers.

    Raises:
        ValueError: if probabilities are negative, not finite or sum to more than 1, or L exceeds 2^15.
    """
    p = np.asarray(probabilities, np.float64)
    if p.ndim != 2 or not 1 <= p.shape[1] <= _TOTAL // 2:
        raise ValueError(f"probabilities must be (K, L) with L from 1 to {_TOTAL // 2}: got {p.shape}")
    if not (np.isfinite(p).all() and (p >= 0).all() and (p.sum(1) <= 1 + 1e-6).all()):
        raise ValueError("probabilities must be finite, not negative and sum to at most 1")
    cdfs = np.full((len(p), p.shape[1] + 2), _TOTAL, np.int64)
    sizes, first = np.empty(len(p), np.int64), np.empty(len(p), np.int64)
    for k, row in enumerate(p):
        worth = np.flatnonzero(row >= 1 / _TOTAL)
        first[k], end = (worth[0], worth[-1] + 1) if len(worth) else (row.argmax(), row.argmax() + 1)
        shares = np.append(row[first[k] : end], max(0.0, 1 - row[first[k] : end].sum()))
        widths = 1 + np.floor(shares / shares.sum() * (_TOTAL - len(shares))).astype(np.int64)
        widths[shares.argmax()] += _TOTAL - widths.sum()
        sizes[k] = len(shares)
        cdfs[k, : len(shares) + 1] = np.append(0, widths.cumsum())
    return CodingTables(cdfs, sizes, first + lowest)


def encode(numbers: np.ndarray | Sequence[int], rows: np.ndarray, tables: CodingTables) -> bytes:
    """Return the message of `numbers`, each coded with its row of `tables`, in that order.

    A number costs `-log2` of its frequency in bits; one outside its table's run costs 32 bits more.

    Args:
        numbers: (M,) integers of at most 32 bits.
        rows: (M,) indices of tables.
        tables: of sender and receiver.

    Raises:
        ValueError: if a number is outside 32 bits, or `rows` is not as long as `numbers`.
    """
    numbers, rows = np.asarray(numbers, np.int64), np.asarray(rows, np.int64)
    if numbers.shape != rows.shape or numbers.ndim != 1:
        raise ValueError(f"numbers and rows must be equally long: got {numbers.shape} and {rows.shape}")
    raw = numbers + (1 << 31)
    if ((raw < 0) | (raw >> 32 > 0)).any():
        raise ValueError("numbers must fit into 32 bits; scale them down")
    last = tables.sizes[rows] - 1
    symbols = numbers - tables.lowest[rows]
    outside = (symbols < 0) | (symbols >= last)
    symbols = np.where(outside, last, symbols)
    count = np.where(outside, 3, 1)
    first = count.cumsum() - count
    starts, widths = np.empty(count.sum(), np.int64), np.ones(count.sum(), np.int64)
    starts[first] = tables.cdfs[rows, symbols]
    widths[first] = tables.cdfs[rows, symbols + 1] - starts[first]
    starts[first[outside] + 1] = raw[outside] >> 16
    starts[first[outside] + 2] = raw[outside] & 0xFFFF
    room = 2 * len(starts) + 8
    if HAS_NUMBA and len(starts) >= _SMALL:
        from omniconv.ops.range_coder import _kernels

        out = np.empty(room, np.uint8)
        written = out[: _kernels.encode(starts, widths, out)].tobytes()
    else:
        buffer = bytearray(room)
        written = bytes(buffer[: reference.encode(starts.tolist(), widths.tolist(), buffer)])
    return written.rstrip(b"\0")  # a message reads as zeros behind its end


def decode(message: bytes, rows: np.ndarray, tables: CodingTables) -> np.ndarray:
    """Return the numbers (M,) of a message of `encode` with the same `rows` and `tables`.

    Any bytes decode to some numbers, in time and memory that depend on `rows` alone.
    """
    rows = np.asarray(rows, np.int64)
    if HAS_NUMBA and len(rows) >= _SMALL:
        from omniconv.ops.range_coder import _kernels

        out = np.empty(len(rows), np.int64)
        data = np.frombuffer(message, np.uint8)
        _kernels.decode(data, rows, tables.cdfs, tables.sizes, tables.lowest, out)
        return out
    numbers = [0] * len(rows)
    reference.decode(
        message, rows.tolist(), tables.cdfs.tolist(), tables.sizes.tolist(), tables.lowest.tolist(), numbers
    )
    return np.array(numbers, np.int64)
