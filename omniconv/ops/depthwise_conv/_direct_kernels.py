"""The loops of the direct depthwise convolution, compiled by numba.

Both kernels take one block of channels of one sample at a time, as many as a vector holds. They copy its map into
a buffer in which the pixels of a row lie side by side, one vector each, with zeros where the padding and the gaps
are, and from there on run over vectors alone, whatever type and memory format the maps have.

A map has three axes here (missing ones have size 1), and along each of them

    coordinate = output * stride + tap * dilation - padding,   and pixel i has the coordinate gap * i.

With gap 1 that is a convolution; the gradient of its input is one with gap and stride exchanged. The last axis is
the one that the registers run along, so callers put the longest axis of the kernel there.
"""

import math
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, njit, types

from omniconv.ops._simd import (
    VECTOR,
    as_pointer,
    atomic_next,
    call,
    call_accumulate,
    clear,
    lanes,
    move,
    transpose,
)

# What the table of a kernel holds from element 1 on; AXIS stands three times, one for every axis.
HEAD = (
    "threads", "scratch", "scratch_bytes", "samples", "channels", "parts",
    "x", "x_n", "x_c", "x_0", "x_1", "x_2", "y", "y_n", "y_c", "y_0", "y_1", "y_2", "weight", "bias", "loops", "count",
)  # fmt: skip
AXIS = ("size", "out", "kernel", "stride", "padding", "dilation", "gap", "tiles")
FIELDS = (*HEAD, *(f"{name}_{axis}" for axis in range(3) for name in AXIS))
_LENGTH = len(FIELDS) + 1
_AXES, _EACH = FIELDS.index("size_0") + 1, len(AXIS)


@njit
def _axis(t, axis):
    """Return what the table says of an axis."""
    i = _AXES + axis * _EACH
    return t[i], t[i + 1], t[i + 2], t[i + 3], t[i + 4], t[i + 5], t[i + 6], t[i + 7]


@njit
def _taps(o, kernel, stride, padding, dilation, gap, size):
    """Return, for output `o`: first tap, step, count; the pixel under the first tap, and pixels a step."""
    step = gap // math.gcd(gap, dilation)
    tap = 0
    while tap < step and (o * stride + tap * dilation - padding) % gap != 0:
        tap += 1
    pixel = (o * stride + tap * dilation - padding) // gap
    pixels = step * dilation // gap
    if tap >= step:
        return 0, 1, 0, 0, 1
    if pixel < 0:
        skipped = (-pixel + pixels - 1) // pixels
        tap, pixel = tap + skipped * step, pixel + skipped * pixels
    if tap >= kernel or pixel >= size:
        return 0, step, 0, 0, pixels
    return tap, step, min((kernel - 1 - tap) // step, (size - 1 - pixel) // pixels) + 1, pixel, pixels


@njit
def _pixels(first, last, kernel, stride, padding, dilation, gap, size):
    """Return which pixels, from and to, the outputs from `first` to before `last` see."""
    low = (first * stride - padding + gap - 1) // gap
    high = ((last - 1) * stride + (kernel - 1) * dilation - padding) // gap + 1
    low = min(max(low, 0), size)
    return low, max(low, min(high, size))


@njit
def _ceil(a, b):
    return -((-a) // b)


@cache
def _packing(dtype: torch.dtype) -> tuple[Any, Any]:
    """Return the compiled functions that copy a box of a map into a buffer, and a row of a buffer into a map."""
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
        first = max(0, _ceil(base, gap))
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

    @cfunc(types.void(*[types.int64] * 6))
    def unpack(buffer, count, y, of_c, of_2, channels):
        if of_c == kept:
            for k in range(count):
                store(y + k * of_2, buffer + k * VECTOR, channels)
        elif of_2 == kept:
            for k in range(0, count, full):
                turn(
                    turn_out, buffer + k * VECTOR, VECTOR, y + k * of_2, of_c, min(full, count - k), channels
                )
        else:
            for lane in range(channels):
                for k in range(count):
                    store_one(y + lane * of_c + k * of_2, buffer + k * VECTOR + lane * computed, 1)

    return pack, unpack


@cache
def weight_packing(dtype: torch.dtype) -> tuple[Any, Any]:
    """Return the functions that bring kernels (C, K0, K1, K2) into vectors of channels, and their gradient back.

    Both are called with plain numbers; strides are bytes. `pack_weight` writes the taps back to front if `flip` is 1,
    and the bias, if its address is not 0, into `start`. `unpack_weight` first adds up the parts of the sum, each of
    which has `taps` vectors in a row of which the last axis of the kernel fills k2.
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

    @njit(types.void(*[types.int64] * 13))
    def pack_weight(packed, start, channels, weight, bias, flip, of_c, of_0, of_1, of_2, k0, k1, k2):
        step = -VECTOR if flip else VECTOR
        for block in range((channels + full - 1) // full):
            here = min(full, channels - block * full)
            zero(start + block * VECTOR)
            if bias != 0:
                load(start + block * VECTOR, bias + block * full * kept, here)
            for line in range(k0 * k1):
                tap = line * k2
                at = packed + (block * k0 * k1 * k2 + (k0 * k1 * k2 - 1 - tap if flip else tap)) * VECTOR
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


def _kernel(share: Any) -> Any:
    """Return the function that every thread calls: it takes shares of the work until none is left.

    The shares are as many as the threads that were asked for, and what each holds does not depend on who takes it.
    So the sums are the same bit for bit every time, and complete where fewer threads come than were asked for.
    """

    @cfunc(types.void(types.voidptr))
    def kernel(data):
        t = carray(data, (_LENGTH,), np.int64)
        slot = atomic_next(t.ctypes.data)
        while slot < t[1]:
            share(t, slot)
            slot = atomic_next(t.ctypes.data)

    return kernel


@cache
def convolve_kernel(dtype: torch.dtype) -> Any:
    """Return the kernel that convolves maps of a type.

    The packed weight and bias have the type that is computed in. The table's `loops` is the address of
    `accumulate(..., keep=False)` for `count` neighbouring outputs of the last axis, no more than its narrowest tile
    has, that lie its stride apart.
    """
    pack, unpack = (function.address for function in _packing(dtype))
    call_pack, call_unpack = call(15), call(6)
    full = lanes(dtype)

    @njit
    def share(t, slot):
        threads, scratch, scratch_bytes, samples, channels, _ = t[1], t[2], t[3], t[4], t[5], t[6]
        x, x_n, x_c, x_0, x_1, x_2 = t[7], t[8], t[9], t[10], t[11], t[12]
        y, y_n, y_c, y_0, y_1, y_2 = t[13], t[14], t[15], t[16], t[17], t[18]
        weight, bias, loops, count = t[19], t[20], t[21], t[22]
        size0, out0, k0, s0, p0, d0, g0, tiles0 = _axis(t, 0)
        size1, out1, k1, s1, p1, d1, g1, tiles1 = _axis(t, 1)
        size2, out2, k2, s2, p2, d2, g2, tiles2 = _axis(t, 2)

        stage = scratch + slot * scratch_bytes
        buffer = stage + (out2 // tiles2 + 1) * VECTOR
        blocks = (channels + full - 1) // full
        tasks = samples * blocks * tiles0 * tiles1 * tiles2
        for task in range(tasks * slot // threads, tasks * (slot + 1) // threads):
            block, rest = task % blocks, task // blocks
            tile2, rest = rest % tiles2, rest // tiles2
            tile1, rest = rest % tiles1, rest // tiles1
            tile0, n = rest % tiles0, rest // tiles0
            here = min(full, channels - block * full)
            from0, to0 = out0 * tile0 // tiles0, out0 * (tile0 + 1) // tiles0
            from1, to1 = out1 * tile1 // tiles1, out1 * (tile1 + 1) // tiles1
            from2, to2 = out2 * tile2 // tiles2, out2 * (tile2 + 1) // tiles2
            low0, high0 = _pixels(from0, to0, k0, s0, p0, d0, g0, size0)
            low1, high1 = _pixels(from1, to1, k1, s1, p1, d1, g1, size1)
            base, width = from2 * s2 - p2, (to2 - from2 - 1) * s2 + (k2 - 1) * d2 + 1
            origin = x + n * x_n + block * full * x_c
            call_pack(
                pack,
                buffer,
                width,
                base,
                g2,
                size2,
                origin,
                x_c,
                x_0,
                x_1,
                x_2,
                low0,
                high0,
                low1,
                high1,
                here,
            )
            row, plane = width * VECTOR, (high1 - low1) * width * VECTOR
            taps = weight + block * k0 * k1 * k2 * VECTOR
            for o0 in range(from0, to0):
                tap0, step0, n0, pixel0, move0 = _taps(o0, k0, s0, p0, d0, g0, size0)
                for o1 in range(from1, to1):
                    tap1, step1, n1, pixel1, move1 = _taps(o1, k1, s1, p1, d1, g1, size1)
                    start = buffer + (pixel0 - low0) * plane + (pixel1 - low1) * row
                    first = taps + (tap0 * k1 + tap1) * k2 * VECTOR
                    o2 = from2
                    while o2 < to2:
                        o2 = min(o2, to2 - count)
                        # Taps that meet nothing but zeros under all `count` outputs are left out.
                        low2 = max(0, _ceil(p2 - (o2 + count - 1) * s2, d2))
                        high2 = min(k2, ((size2 - 1) * g2 + p2 - o2 * s2) // d2 + 1)
                        call_accumulate(
                            loops, stage + (o2 - from2) * VECTOR, bias + block * VECTOR,
                            start + ((o2 - from2) * s2 + low2 * d2) * VECTOR, first + low2 * VECTOR,
                            n0, move0 * plane, step0 * k1 * k2 * VECTOR,
                            n1, move1 * row, step1 * k2 * VECTOR,
                            max(0, high2 - low2), d2 * VECTOR, VECTOR,
                        )  # fmt: skip
                        o2 += count
                    to = y + n * y_n + block * full * y_c + o0 * y_0 + o1 * y_1 + from2 * y_2
                    call_unpack(unpack, stage, to2 - from2, to, y_c, y_2, here)

    return _kernel(share)


@cache
def weight_kernel(dtype: torch.dtype) -> Any:
    """Return the kernel that sums the gradient of the weight over maps of a type.

    The packed gradient has the type that is computed in. The table's `loops` is the address of
    `accumulate(..., keep=True)` for `count` neighbouring taps of the last axis, a divisor of the packed gradient's
    length along it, that lie its dilation apart.
    """
    pack, call_pack = _packing(dtype)[0].address, call(15)
    full = lanes(dtype)
    zero = clear(dtype)

    @njit
    def share(t, slot):
        threads, scratch, scratch_bytes, samples, channels, parts = t[1], t[2], t[3], t[4], t[5], t[6]
        x, x_n, x_c, x_0, x_1, x_2 = t[7], t[8], t[9], t[10], t[11], t[12]
        y, y_n, y_c, y_0, y_1, y_2 = t[13], t[14], t[15], t[16], t[17], t[18]
        weight, loops, count = t[19], t[21], t[22]
        size0, out0, k0, s0, p0, d0, g0, tiles0 = _axis(t, 0)
        size1, out1, k1, s1, p1, d1, g1, tiles1 = _axis(t, 1)
        size2, out2, k2, s2, p2, d2, g2, tiles2 = _axis(t, 2)

        blocks = (channels + full - 1) // full
        tiles = tiles0 * tiles1 * tiles2
        tasks = parts * blocks
        for task in range(tasks * slot // threads, tasks * (slot + 1) // threads):
            block, part = task % blocks, task // blocks
            here = min(full, channels - block * full)
            taps = weight + task * k0 * k1 * k2 * VECTOR
            for tap in range(k0 * k1 * k2):
                zero(taps + tap * VECTOR)
            total = samples * tiles
            for piece in range(total * part // parts, total * (part + 1) // parts):
                tile2, rest = piece % tiles2, piece // tiles2
                tile1, rest = rest % tiles1, rest // tiles1
                tile0, n = rest % tiles0, rest // tiles0
                from0, to0 = out0 * tile0 // tiles0, out0 * (tile0 + 1) // tiles0
                from1, to1 = out1 * tile1 // tiles1, out1 * (tile1 + 1) // tiles1
                from2, to2 = out2 * tile2 // tiles2, out2 * (tile2 + 1) // tiles2
                low0, high0 = _pixels(from0, to0, k0, s0, p0, d0, g0, size0)
                low1, high1 = _pixels(from1, to1, k1, s1, p1, d1, g1, size1)
                base, width = from2 * s2 - p2, (to2 - from2 - 1) * s2 + (k2 - 1) * d2 + 1
                row, plane = width * VECTOR, (high1 - low1) * width * VECTOR
                buffer = scratch + slot * scratch_bytes
                gradient = buffer + (high0 - low0) * plane
                at = x + n * x_n + block * full * x_c
                call_pack(
                    pack,
                    buffer,
                    width,
                    base,
                    g2,
                    size2,
                    at,
                    x_c,
                    x_0,
                    x_1,
                    x_2,
                    low0,
                    high0,
                    low1,
                    high1,
                    here,
                )
                at = y + n * y_n + block * full * y_c
                call_pack(
                    pack, gradient, to2 - from2, from2, 1, out2, at, y_c, y_0, y_1, y_2, from0, to0, from1, to1, here
                )  # fmt: skip
                for o0 in range(from0, to0):
                    tap0, step0, n0, pixel0, move0 = _taps(o0, k0, s0, p0, d0, g0, size0)
                    for o1 in range(from1, to1):
                        tap1, step1, n1, pixel1, move1 = _taps(o1, k1, s1, p1, d1, g1, size1)
                        grad = gradient + ((o0 - from0) * (to1 - from1) + o1 - from1) * (to2 - from2) * VECTOR
                        for i in range(n0):
                            for j in range(n1):
                                into = taps + ((tap0 + i * step0) * k1 + tap1 + j * step1) * k2 * VECTOR
                                start = (
                                    buffer
                                    + (pixel0 + i * move0 - low0) * plane
                                    + (pixel1 + j * move1 - low1) * row
                                )
                                for tap in range(0, k2, count):
                                    # Outputs under which all `count` taps meet nothing but zeros are left out.
                                    low2 = max(from2, _ceil(p2 - (tap + count - 1) * d2, s2))
                                    high2 = min(to2, ((size2 - 1) * g2 + p2 - tap * d2) // s2 + 1)
                                    call_accumulate(
                                        loops, into + tap * VECTOR, 0,
                                        start + ((low2 - from2) * s2 + tap * d2) * VECTOR,
                                        grad + (low2 - from2) * VECTOR,
                                        1, 0, 0, 1, 0, 0, max(0, high2 - low2), s2 * VECTOR, VECTOR,
                                    )  # fmt: skip

    return _kernel(share)
