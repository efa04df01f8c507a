"""The loops of the depthwise convolution in the frequencies of rows, compiled by numba.

Both kernels take one block of channels of one sample (and tile) at a time, as many as a vector holds, and copy its
rows, a few at a time, out of the map. A row becomes its spectrum, of which frequency f is written to a place of its
own, so that every frequency holds a map of complex vectors, one for every row:

    spectra + f * step + ((plane * rows) + row) * PAIR.

Rows of zeros stand above and below the map, for the sums of several neighbouring rows that registers hold have the
taps in common that any of them meets.
"""

from functools import cache
from typing import Any

import torch
from numba import njit

from omniconv.ops._fourier import PAIR, call_transform
from omniconv.ops._simd import VECTOR, call, call_correlate, clear, copy, lanes
from omniconv.ops.depthwise_conv._packing import ceil_div, map_packing, parallel_kernel

# What the table of a kernel holds from element 1 on; AXIS stands three times, one for every axis.
HEAD = (
    "threads", "scratch", "scratch_bytes", "samples", "channels", "parts",
    "x", "x_n", "x_c", "x_0", "x_1", "x_2", "y", "y_n", "y_c", "y_0", "y_1", "y_2",
    "weight", "bias", "loops", "count", "transform", "inverse", "length",
)  # fmt: skip
AXIS = ("size", "out", "kernel", "padding", "tiles")
FIELDS = (*HEAD, *(f"{name}_{axis}" for axis in range(3) for name in AXIS))
_LENGTH = len(FIELDS) + 1
_AXES, _EACH = FIELDS.index("size_0") + 1, len(AXIS)


@njit
def _axis(t, axis):
    """Return what the table says of an axis."""
    i = _AXES + axis * _EACH
    return t[i], t[i + 1], t[i + 2], t[i + 3], t[i + 4]


@njit
def _window(size, out, kernel, padding, tiles, tile):
    """Return which outputs a tile has along an axis, from and to, and which pixels they meet."""
    first, last = out * tile // tiles, out * (tile + 1) // tiles
    low = max(0, first - padding)
    return first, last, low, max(low, min(size, last - 1 + kernel - padding))


@njit
def frequency_step(vectors):
    """Return the bytes from one frequency to the next, an odd number of vectors, so that they share no cache sets."""
    return vectors * PAIR + VECTOR


@cache
def _spectra(dtype: torch.dtype) -> Any:
    """Return the function that makes the spectra of rows of a map."""
    pack, call_pack = map_packing(dtype)[0].address, call(15)
    full, kept = lanes(dtype), dtype.itemsize

    @njit
    def spectra(
        to, step, rows, above, stage, transform, length, base, size, map, of_c, of_0, of_1, of_2, box, channels
    ):  # fmt: skip
        """Write the rows `box` of a map, the first one `above` rows below the first vector of every plane."""
        low0, high0, low1, high1 = box
        # Rows across which the numbers lie side by side are copied as squares.
        group = full if of_1 == kept else 1
        for i in range(low0, high0):
            plane = to + ((i - low0) * rows + above - low1) * PAIR
            for j in range(low1, high1, group):
                several = min(group, high1 - j)
                call_pack(
                    pack, stage, length, base, 1, size, map, of_c, of_0, of_1, of_2, i, i + 1, j, j + several, channels
                )  # fmt: skip
                for k in range(several):
                    call_transform(transform, stage + k * length * VECTOR, plane + (j + k) * PAIR, step)

    return spectra


@cache
def _blank(dtype: torch.dtype) -> Any:
    zero = clear(dtype)

    @njit
    def blank(to, step, frequencies, planes, rows, above, below):
        """Write zeros to the first `above` and the last `below` rows of every plane."""
        for f in range(frequencies):
            for plane in range(planes):
                at = to + f * step + plane * rows * PAIR
                for vector in range(2 * above):
                    zero(at + vector * VECTOR)
                for vector in range(2 * (rows - below), 2 * rows):
                    zero(at + vector * VECTOR)

    return blank


@cache
def taps_kernel() -> Any:
    """Return the kernel that makes the spectra of packed weights.

    Its table holds threads, blocks of channels, rows of a block, length, and the addresses of the packed weight, of its
    spectra and of the transform. Rows are filled up with zeros to the length of the transform.
    """

    @njit
    def share(t, slot):
        threads, blocks, rows, length, weight, spectra, transform = t[1], t[2], t[3], t[4], t[5], t[6], t[7]
        step = frequency_step(rows)
        for block in range(blocks * slot // threads, blocks * (slot + 1) // threads):
            to = spectra + block * (length // 2 + 1) * step
            for row in range(rows):
                at = weight + (block * rows + row) * length * VECTOR
                call_transform(transform, at, to + row * PAIR, step)

    return parallel_kernel(share, 8)


@cache
def convolve_kernel(dtype: torch.dtype) -> Any:
    """Return the kernel that convolves maps of a type.

    The spectra of the weight and of the bias have the type that is computed in. The table's `loops` is the address of
    `correlate(..., keep=False)` for `count` neighbouring outputs of the middle axis, no more than its narrowest tile
    has.
    """
    unpack, call_unpack = map_packing(dtype)[1].address, call(9)
    duplicate, full, kept = copy(dtype), lanes(dtype), dtype.itemsize
    spectra, blank = _spectra(dtype), _blank(dtype)

    @njit
    def share(t, slot):
        threads, scratch, scratch_bytes, samples, channels = t[1], t[2], t[3], t[4], t[5]
        x, x_n, x_c, x_0, x_1, x_2 = t[7], t[8], t[9], t[10], t[11], t[12]
        y, y_n, y_c, y_0, y_1, y_2 = t[13], t[14], t[15], t[16], t[17], t[18]
        weight, bias, loops, count = t[19], t[20], t[21], t[22]
        transform, inverse, length = t[23], t[24], t[25]
        size0, out0, k0, p0, tiles0 = _axis(t, 0)
        size1, out1, k1, p1, tiles1 = _axis(t, 1)
        size2, out2, _, p2, tiles2 = _axis(t, 2)

        frequencies = length // 2 + 1
        group = full if y_1 == kept else 1
        step_w = frequency_step(k0 * k1)
        stage = scratch + slot * scratch_bytes
        sums = stage + full * length * VECTOR
        maps = sums + (out0 // tiles0 + 1) * (out1 // tiles1 + 1) * PAIR
        blocks = (channels + full - 1) // full
        each = samples * tiles0 * tiles1 * tiles2
        tasks = blocks * each
        for task in range(tasks * slot // threads, tasks * (slot + 1) // threads):
            # One after the other come blocks whose channels lie side by side, else maps that meet the same taps.
            block, rest = (task % blocks, task // blocks) if x_c == kept else (task // each, task % each)
            tile2, rest = rest % tiles2, rest // tiles2
            tile1, rest = rest % tiles1, rest // tiles1
            tile0, n = rest % tiles0, rest // tiles0
            here = min(full, channels - block * full)
            taps = weight + block * frequencies * step_w
            from0, to0, low0, high0 = _window(size0, out0, k0, p0, tiles0, tile0)
            from1, to1, low1, high1 = _window(size1, out1, k1, p1, tiles1, tile1)
            from2, to2 = out2 * tile2 // tiles2, out2 * (tile2 + 1) // tiles2
            outs0, outs1 = to0 - from0, to1 - from1
            rows = outs1 - 1 + k1
            above = min(rows, low1 - from1 + p1)
            step = frequency_step(max((high0 - low0) * rows, outs0 * outs1))
            blank(maps, step, frequencies, high0 - low0, rows, above, rows - above - high1 + low1)
            spectra(
                maps, step, rows, above, stage, transform, length, from2 - p2, size2,
                x + n * x_n + block * full * x_c, x_c, x_0, x_1, x_2, (low0, high0, low1, high1), here,
            )  # fmt: skip
            for f in range(frequencies):
                map, other = maps + f * step, taps + f * step_w
                # A number in frequency zero is added to the whole row.
                start = bias + (block if f == 0 else blocks) * PAIR
                for o0 in range(from0, to0):
                    tap0 = max(0, p0 - o0)
                    n0 = max(0, min(k0, size0 + p0 - o0) - tap0)
                    plane = map + (o0 + tap0 - p0 - low0) * rows * PAIR
                    o1 = from1
                    while o1 < to1:
                        o1 = min(o1, to1 - count)
                        # Taps that meet nothing but zeros under all `count` outputs are left out.
                        tap1 = max(0, p1 - (o1 + count - 1))
                        n1 = max(0, min(k1, size1 + p1 - o1) - tap1)
                        call_correlate(
                            loops, sums + ((o0 - from0) * outs1 + o1 - from1) * PAIR, start,
                            plane + (o1 - from1 + tap1) * PAIR, other + (tap0 * k1 + tap1) * PAIR,
                            n0, rows * PAIR, k1 * PAIR, n1, PAIR, PAIR,
                        )  # fmt: skip
                        o1 += count
                # The output's spectrum takes the place of the map's, which this frequency needs no more.
                for vector in range(2 * outs0 * outs1):
                    duplicate(map + vector * VECTOR, sums + vector * VECTOR)
            to = y + n * y_n + block * full * y_c + from0 * y_0 + from1 * y_1 + from2 * y_2
            for i in range(outs0):
                for j in range(0, outs1, group):
                    several = min(group, outs1 - j)
                    for k in range(several):
                        call_transform(
                            inverse, stage + k * length * VECTOR, maps + (i * outs1 + j + k) * PAIR, step
                        )
                    call_unpack(
                        unpack, stage, length * VECTOR, several, to2 - from2, to + i * y_0 + j * y_1,
                        y_c, y_1, y_2, here,
                    )  # fmt: skip

    return parallel_kernel(share, _LENGTH)


@cache
def weight_kernel(dtype: torch.dtype) -> Any:
    """Return the kernel that sums the gradient of the weight over maps of a type.

    The packed gradient has the type that is computed in. The table's `loops` is the address of
    `correlate(..., keep=True)` for `count` neighbouring taps of the middle axis.
    """
    duplicate, full = copy(dtype), lanes(dtype)
    spectra, blank = _spectra(dtype), _blank(dtype)

    @njit
    def share(t, slot):
        threads, scratch, scratch_bytes, samples, channels, parts = t[1], t[2], t[3], t[4], t[5], t[6]
        x, x_n, x_c, x_0, x_1, x_2 = t[7], t[8], t[9], t[10], t[11], t[12]
        y, y_n, y_c, y_0, y_1, y_2 = t[13], t[14], t[15], t[16], t[17], t[18]
        weight, loops, count = t[19], t[21], t[22]
        transform, inverse, length = t[23], t[24], t[25]
        size0, out0, k0, p0, tiles0 = _axis(t, 0)
        size1, out1, k1, p1, tiles1 = _axis(t, 1)
        size2, out2, k2, p2, tiles2 = _axis(t, 2)

        frequencies = length // 2 + 1
        # Taps beyond the kernel fill up the last of its registers.
        padded = ceil_div(k1, count) * count
        step_w = frequency_step(k0 * padded)
        stage = scratch + slot * scratch_bytes
        taps = stage + full * length * VECTOR
        space = taps + frequencies * step_w
        blocks = (channels + full - 1) // full
        tiles = tiles0 * tiles1 * tiles2
        total = samples * tiles
        tasks = parts * blocks
        for task in range(tasks * slot // threads, tasks * (slot + 1) // threads):
            block, part = task % blocks, task // blocks
            here = min(full, channels - block * full)
            blank(taps, step_w, frequencies, 1, k0 * padded, k0 * padded, 0)
            for piece in range(total * part // parts, total * (part + 1) // parts):
                tile2, rest = piece % tiles2, piece // tiles2
                tile1, rest = rest % tiles1, rest // tiles1
                tile0, n = rest % tiles0, rest // tiles0
                from0, to0, low0, high0 = _window(size0, out0, k0, p0, tiles0, tile0)
                from1, to1, low1, high1 = _window(size1, out1, padded, p1, tiles1, tile1)
                from2, to2 = out2 * tile2 // tiles2, out2 * (tile2 + 1) // tiles2
                outs0, outs1 = to0 - from0, to1 - from1
                rows = outs1 - 1 + padded
                above = min(rows, low1 - from1 + p1)
                step, step_y = frequency_step((high0 - low0) * rows), frequency_step(outs0 * outs1)
                grads = space
                maps = grads + frequencies * step_y
                blank(maps, step, frequencies, high0 - low0, rows, above, rows - above - high1 + low1)
                spectra(
                    maps, step, rows, above, stage, transform, length, from2 - p2, size2,
                    x + n * x_n + block * full * x_c, x_c, x_0, x_1, x_2, (low0, high0, low1, high1), here,
                )  # fmt: skip
                spectra(
                    grads, step_y, outs1, 0, stage, transform, length, from2, to2,
                    y + n * y_n + block * full * y_c, y_c, y_0, y_1, y_2, (from0, to0, from1, to1), here,
                )  # fmt: skip
                for f in range(frequencies):
                    map, grad, into = maps + f * step, grads + f * step_y, taps + f * step_w
                    for tap0 in range(k0):
                        # Outputs whose tap lies on the padding are left out, along the middle axis those for which
                        # all `count` taps do.
                        first0, last0 = max(from0, p0 - tap0), min(to0, size0 + p0 - tap0)
                        plane = map + (first0 + tap0 - p0 - low0) * rows * PAIR
                        for tap1 in range(0, padded, count):
                            first1 = max(from1, p1 - (tap1 + count - 1))
                            last1 = min(to1, size1 + p1 - tap1)
                            call_correlate(
                                loops, into + (tap0 * padded + tap1) * PAIR, 0,
                                plane + (first1 - from1 + tap1) * PAIR,
                                grad + ((first0 - from0) * outs1 + first1 - from1) * PAIR,
                                max(0, last0 - first0), rows * PAIR, outs1 * PAIR,
                                max(0, last1 - first1), PAIR, PAIR,
                            )  # fmt: skip
            for tap0 in range(k0):
                for tap1 in range(k1):
                    call_transform(inverse, stage, taps + (tap0 * padded + tap1) * PAIR, step_w)
                    to = weight + ((task * k0 + tap0) * k1 + tap1) * k2 * VECTOR
                    for tap2 in range(k2):
                        duplicate(to + tap2 * VECTOR, stage + tap2 * VECTOR)

    return parallel_kernel(share, _LENGTH)
