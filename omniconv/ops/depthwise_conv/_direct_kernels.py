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

import torch
from numba import njit

from omniconv.ops._simd import VECTOR, call, call_accumulate, clear, lanes
from omniconv.ops.depthwise_conv._packing import ceil_div, map_packing, parallel_kernel

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


@cache
def convolve_kernel(dtype: torch.dtype) -> Any:
    """Return the kernel that convolves maps of a type.

    The packed weight and bias have the type that is computed in. The table's `loops` is the address of
    `accumulate(..., keep=False)` for `count` neighbouring outputs of the last axis, no more than its narrowest tile
    has, that lie its stride apart.
    """
    pack, unpack = (function.address for function in map_packing(dtype))
    call_pack, call_unpack = call(15), call(9)
    full, kept = lanes(dtype), dtype.itemsize

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
        # Rows across which the numbers lie side by side are copied as squares.
        group = full if y_1 == kept and y_c != kept else 1
        buffer = stage + group * (out2 // tiles2 + 1) * VECTOR
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
                    place = (o1 - from1) % group
                    into = stage + place * (to2 - from2) * VECTOR
                    o2 = from2
                    while o2 < to2:
                        o2 = min(o2, to2 - count)
                        # Taps that meet nothing but zeros under all `count` outputs are left out.
                        low2 = max(0, ceil_div(p2 - (o2 + count - 1) * s2, d2))
                        high2 = min(k2, ((size2 - 1) * g2 + p2 - o2 * s2) // d2 + 1)
                        call_accumulate(
                            loops, into + (o2 - from2) * VECTOR, bias + block * VECTOR,
                            start + ((o2 - from2) * s2 + low2 * d2) * VECTOR, first + low2 * VECTOR,
                            n0, move0 * plane, step0 * k1 * k2 * VECTOR,
                            n1, move1 * row, step1 * k2 * VECTOR,
                            max(0, high2 - low2), d2 * VECTOR, VECTOR,
                        )  # fmt: skip
                        o2 += count
                    if place == group - 1 or o1 == to1 - 1:
                        to = y + n * y_n + block * full * y_c + o0 * y_0 + (o1 - place) * y_1 + from2 * y_2
                        pitch = (to2 - from2) * VECTOR
                        call_unpack(unpack, stage, pitch, place + 1, to2 - from2, to, y_c, y_1, y_2, here)

    return parallel_kernel(share, _LENGTH)


@cache
def weight_kernel(dtype: torch.dtype) -> Any:
    """Return the kernel that sums the gradient of the weight over maps of a type.

    The packed gradient has the type that is computed in. The table's `loops` is the address of
    `accumulate(..., keep=True)` for `count` neighbouring taps of the last axis, a divisor of the packed gradient's
    length along it, that lie its dilation apart.
    """
    pack, call_pack = map_packing(dtype)[0].address, call(15)
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
                                    low2 = max(from2, ceil_div(p2 - (tap + count - 1) * d2, s2))
                                    high2 = min(to2, ((size2 - 1) * g2 + p2 - tap * d2) // s2 + 1)
                                    call_accumulate(
                                        loops, into + tap * VECTOR, 0,
                                        start + ((low2 - from2) * s2 + tap * d2) * VECTOR,
                                        grad + (low2 - from2) * VECTOR,
                                        1, 0, 0, 1, 0, 0, max(0, high2 - low2), s2 * VECTOR, VECTOR,
                                    )  # fmt: skip

    return parallel_kernel(share, _LENGTH)
