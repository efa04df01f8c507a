"""How maps and kernels come into vectors of channels and back, and how kernels are shared out among threads."""

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, njit, types

from omniconv.ops._simd import VECTOR, as_pointer, atomic_next, call, clear, lanes, move, transpose


@njit
def ceil_div(a, b):
    return -((-a) // b)


@cache
def map_packing(dtype: torch.dtype) -> tuple[Any, Any]:
    """Return the compiled functions that copy a box of a map into a buffer, and rows of a buffer into a map.

    `pack(buffer, width, base, gap, size, x, of_c, of_0, of_1, of_2, low_0, high_0, low_1, high_1, channels)` writes
    rows of `width` vectors, of which the first has the coordinate `base`; pixel i of `size` has the coordinate `gap` i,
    and zeros stand where there is none. `unpack(buffer, row, rows, count, y, of_c, of_1, of_2, channels)` reads rows of
    `count` vectors that lie `row` bytes apart. `of_c` to `of_2` are strides of the map in bytes.
    """
    full, kept = lanes(dtype), dtype.itemsize
    computed = VECTOR // full
    zero, load, load_one = clear(dtype), move(dtype, load=True, width=full), move(dtype, load=True, width=1)
    store, store_one = move(dtype, load=False, width=full), move(dtype, load=False, width=1)
    turn, turn_in, turn_out = (
        call(6),
        transpose(dtype, load=True).address,
        transpose(dtype, load=False).address,
    )

    @cfunc(types.void(*[types.int64] * 15))
    def pack(
        buffer, width, base, gap, size, x, of_c, of_0, of_1, of_2, low_0, high_0, low_1, high_1, channels
    ):
        first = max(0, ceil_div(base, gap))
        last = max(first, min(size, (base + width - 1) // gap + 1))
        rows, row = high_1 - low_1, width * VECTOR
        start = buffer + (first * gap - base) * VECTOR
        for line in range((high_0 - low_0) * rows):
            at = buffer + line * row
            if gap == 1:
                for column in range(first - base):
                    zero(at + column * VECTOR)
                for column in range(last - base, width):
                    zero(at + column * VECTOR)
            else:
                for column in range(width):
                    zero(at + column * VECTOR)
        for i in range(low_0, high_0):
            plane = start + (i - low_0) * rows * row
            source = x + i * of_0 + low_1 * of_1 + first * of_2
            if of_c == kept:
                for j in range(rows):
                    for k in range(last - first):
                        load(plane + j * row + k * gap * VECTOR, source + j * of_1 + k * of_2, channels)
            elif of_2 == kept:
                for j in range(rows):
                    for k in range(0, last - first, full):
                        turn(
                            turn_in, plane + j * row + k * gap * VECTOR, gap * VECTOR,
                            source + j * of_1 + k * of_2, of_c, min(full, last - first - k), channels,
                        )  # fmt: skip
            elif of_1 == kept:
                for k in range(last - first):
                    for j in range(0, rows, full):
                        turn(
                            turn_in, plane + j * row + k * gap * VECTOR, row, source + j * of_1 + k * of_2, of_c,
                            min(full, rows - j), channels,
                        )  # fmt: skip
            else:
                for j in range(rows):
                    for lane in range(channels):
                        to, one = plane + j * row + lane * computed, source + j * of_1 + lane * of_c
                        for k in range(last - first):
                            load_one(to + k * gap * VECTOR, one + k * of_2, 1)

    @cfunc(types.void(*[types.int64] * 9))
    def unpack(buffer, row, rows, count, y, of_c, of_1, of_2, channels):
        if of_1 == kept and of_c != kept and of_2 != kept:
            for k in range(count):
                for j in range(0, rows, full):
                    at, to = buffer + j * row + k * VECTOR, y + j * of_1 + k * of_2
                    turn(turn_out, at, row, to, of_c, min(full, rows - j), channels)
            return
        for j in range(rows):
            at, to = buffer + j * row, y + j * of_1
            if of_c == kept:
                for k in range(count):
                    store(to + k * of_2, at + k * VECTOR, channels)
            elif of_2 == kept:
                for k in range(0, count, full):
                    turn(
                        turn_out, at + k * VECTOR, VECTOR, to + k * of_2, of_c, min(full, count - k), channels
                    )
            else:
                for lane in range(channels):
                    for k in range(count):
                        store_one(to + lane * of_c + k * of_2, at + k * VECTOR + lane * computed, 1)

    return pack, unpack


@cache
def weight_packing(dtype: torch.dtype) -> tuple[Any, Any]:
    """Return the functions that bring kernels (C, K0, K1, K2) into vectors of channels, and their gradient back.

    Both are called with plain numbers; strides are bytes. `pack_weight` writes the taps back to front if `flip` is 1,
    rows of them `row` vectors apart, and the bias, if its address is not 0, into `start`. `unpack_weight` first adds up
    the parts of the sum, each of which has `taps` vectors in a row of which the last axis of the kernel fills k2.
    """
    full, kept = lanes(dtype), dtype.itemsize
    computed = VECTOR // full
    zero, load, load_one = clear(dtype), move(dtype, load=True, width=full), move(dtype, load=True, width=1)
    store_one = move(dtype, load=False, width=1)
    turn, turn_in, turn_out = (
        call(6),
        transpose(dtype, load=True).address,
        transpose(dtype, load=False).address,
    )
    number = types.float64 if dtype == torch.float64 else types.float32

    @njit(types.void(*[types.int64] * 14))
    def pack_weight(packed, row, start, channels, weight, bias, flip, of_c, of_0, of_1, of_2, k0, k1, k2):
        step = -VECTOR if flip else VECTOR
        for block in range((channels + full - 1) // full):
            here = min(full, channels - block * full)
            zero(start + block * VECTOR)
            if bias != 0:
                load(start + block * VECTOR, bias + block * full * kept, here)
            for line in range(k0 * k1):
                place = (k0 * k1 - 1 - line) * row + k2 - 1 if flip else line * row
                at = packed + (block * k0 * k1 * row + place) * VECTOR
                source = weight + block * full * of_c + line // k1 * of_0 + line % k1 * of_1
                if of_2 == kept:
                    for k in range(0, k2, full):
                        turn(turn_in, at + k * step, step, source + k * of_2, of_c, min(full, k2 - k), here)
                else:
                    for k in range(k2):
                        zero(at + k * step)
                        for lane in range(here):
                            load_one(at + k * step + lane * computed, source + lane * of_c + k * of_2, 1)

    @njit(types.void(*[types.int64] * 12))
    def unpack_weight(sums, parts, taps, channels, weight, of_c, of_0, of_1, of_2, k0, k1, k2):
        blocks = (channels + full - 1) // full
        each = blocks * k0 * k1 * taps * full
        numbers = carray(as_pointer(sums, number), (parts, each))
        for part in range(1, parts):
            for i in range(each):
                numbers[0, i] += numbers[part, i]
        for block in range(blocks):
            here = min(full, channels - block * full)
            for line in range(k0 * k1):
                at = sums + (block * k0 * k1 + line) * taps * VECTOR
                to = weight + block * full * of_c + line // k1 * of_0 + line % k1 * of_1
                if of_2 == kept:
                    for k in range(0, k2, full):
                        turn(turn_out, at + k * VECTOR, VECTOR, to + k * of_2, of_c, min(full, k2 - k), here)
                else:
                    for lane in range(here):
                        for k in range(k2):
                            store_one(to + lane * of_c + k * of_2, at + k * VECTOR + lane * computed, 1)

    return pack_weight, unpack_weight


def parallel_kernel(share: Any, length: int) -> Any:
    """Return the function that every thread calls: it takes shares of the work until none is left.

    The shares are as many as the threads that were asked for, and what each holds does not depend on who takes it.
    So the sums are the same bit for bit every time, and complete where fewer threads come than were asked for.

    Args:
        share: `share(table, number)`, compiled.
        length: of the table.
    """

    @cfunc(types.void(types.voidptr))
    def kernel(data):
        t = carray(data, (length,), np.int64)
        slot = atomic_next(t.ctypes.data)
        while slot < t[1]:
            share(t, slot)
            slot = atomic_next(t.ctypes.data)

    return kernel
