"""Compiled tiles of a ConvFirst block."""

import numba
import numpy as np


@numba.njit(nogil=True, cache=True, fastmath={"contract", "reassoc", "nsz"})
def tiles(
    begin, end, x, out, taps, conv_bias, expand, expand_bias, project, project_bias, rows, columns, moved
):
    """Compute tiles `begin` to `end`.

    Args:
        begin: first tile.
        end: beyond the last.
        x: maps (N, H, W, C).
        out: maps (N, H, W, C), written.
        taps: of the grouped convolution, (K, K, groups, inputs, outputs).
        conv_bias: (C,).
        expand: (C, E).
        expand_bias: (E,).
        project: (E, C).
        project_bias: (C,).
        rows: of a tile.
        columns: of a tile.
        moved: entries that each tile loads and stores, written.
    """
    _, height, width, channels = x.shape
    size, _, groups, inside, _ = taps.shape
    reach = size // 2
    down, across = (height + rows - 1) // rows, (width + columns - 1) // columns
    weights = taps.size + conv_bias.size + expand.size + expand_bias.size + project.size + project_bias.size
    halo = np.zeros((rows + 2 * reach, columns + 2 * reach, channels), x.dtype)
    mixed = np.zeros((rows * columns, channels), x.dtype)
    for index in range(begin, end):
        n, place = index // (down * across), index % (down * across)
        top, left = place // across * rows, place % across * columns
        high, wide = min(rows, height - top), min(columns, width - left)
        count = weights
        for i in range(high + 2 * reach):
            for j in range(wide + 2 * reach):
                row, column = top + i - reach, left + j - reach
                if 0 <= row < height and 0 <= column < width:
                    for c in range(channels):
                        halo[i, j, c] = x[n, row, column, c]
                    count += channels
                else:
                    halo[i, j] = 0
        for i in range(high):
            for j in range(wide):
                here = mixed[i * wide + j]
                here[:] = conv_bias
                for u in range(size):
                    for v in range(size):
                        around = halo[i + u, j + v]
                        for g in range(groups):
                            first = g * inside
                            for a in range(inside):
                                value = around[first + a]
                                tap = taps[u, v, g, a]
                                for b in range(inside):
                                    here[first + b] += value * tap[b]
        hidden = np.dot(mixed[: high * wide], expand)
        for p in range(high * wide):
            for e in range(hidden.shape[1]):
                hidden[p, e] = max(hidden[p, e] + expand_bias[e], 0)
        result = np.dot(hidden, project)
        for i in range(high):
            for j in range(wide):
                for c in range(channels):
                    own = halo[i + reach, j + reach, c]
                    out[n, top + i, left + j, c] = own + result[i * wide + j, c] + project_bias[c]
                count += channels
        moved[index] = count
