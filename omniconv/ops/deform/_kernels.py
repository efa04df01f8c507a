"""Loops over a vector of channels, for numba: where a sample lies is worked out once for all channels of its group.

Arrays are pixel-major: x (N H W G, C / G), offset (N P G, K, 2), mask (N P G, K), and output (N P T G, C / G) with
T = K rows a pixel where the taps are kept and one where they are added up.
"""

import numpy as np
from numba import njit

# Not "fast": positions that are not numbers must compare as such, for they may not become addresses.
_OPTIONS = {"nogil": True, "cache": True, "error_model": "numpy", "fastmath": {"contract", "reassoc", "nsz"}}
_ZERO, _ONE = np.float32(0), np.float32(1)


@njit(**_OPTIONS)
def _ends(position, size):
    """Return the pixels on both sides of a position, their shares, and the slopes of these; all 0 outside."""
    if not (position > -1 and position < size):
        return 0, 0, _ZERO, _ZERO, _ZERO, _ZERO
    low = int(position) - (position < 0)
    high = low + 1
    high_share = position - np.float32(low)
    low_share = _ONE - high_share
    low_slope, high_slope = -_ONE, _ONE
    if low < 0:
        low, low_share, low_slope = 0, low_share * _ZERO, _ZERO
    if high == size:
        high, high_share, high_slope = low, high_share * _ZERO, _ZERO
    return low, high, low_share, high_share, low_slope, high_slope


@njit(**_OPTIONS)
def forward(begin, end, x, offset, mask, out, origin_y, origin_x, taps, scale, sizes):
    """Add the samples of rows `begin` to `end` of the output maps to `out`."""
    height, width, groups, step = sizes
    out_h, out_w, count, channels = len(origin_y), len(origin_x), len(taps), x.shape[1]
    kept = 1 + (count - 1) * step
    where = np.empty((count, 4), np.int64)
    share = np.empty((count, 4), x.dtype)
    for pixel in range(begin * out_w, end * out_w):
        n, i, j = pixel // (out_h * out_w), pixel // out_w % out_h, pixel % out_w
        for g in range(groups):
            q = pixel * groups + g
            for k in range(count):
                y0, y1, a0, a1, _, _ = _ends(origin_y[i] + taps[k, 0] + scale * offset[q, k, 0], height)
                z0, z1, b0, b1, _, _ = _ends(origin_x[j] + taps[k, 1] + scale * offset[q, k, 1], width)
                y0, y1 = (n * height + y0) * width, (n * height + y1) * width
                a0, a1 = a0 * mask[q, k], a1 * mask[q, k]
                where[k, 0], share[k, 0] = (y0 + z0) * groups + g, a0 * b0
                where[k, 1], share[k, 1] = (y0 + z1) * groups + g, a0 * b1
                where[k, 2], share[k, 2] = (y1 + z0) * groups + g, a1 * b0
                where[k, 3], share[k, 3] = (y1 + z1) * groups + g, a1 * b1
            for k in range(count):
                x0, x1, x2, x3 = x[where[k, 0]], x[where[k, 1]], x[where[k, 2]], x[where[k, 3]]
                s0, s1, s2, s3 = share[k, 0], share[k, 1], share[k, 2], share[k, 3]
                y = out[(pixel * kept + k * step) * groups + g]
                for c in range(channels):
                    y[c] += s0 * x0[c] + s1 * x1[c] + s2 * x2[c] + s3 * x3[c]


@njit(**_OPTIONS)
def backward(
    begin, end, x, offset, mask, grad, of_x, of_offset, of_mask, origin_y, origin_x, taps, scale, sizes
):
    """Add the gradients of groups `begin` to `end`, counted over all samples: they share no memory."""
    height, width, groups, step = sizes
    out_h, out_w, count, channels = len(origin_y), len(origin_x), len(taps), x.shape[1]
    kept = 1 + (count - 1) * step
    for part in range(begin, end):
        n, g = part // groups, part % groups
        for place in range(out_h * out_w):
            i, j = place // out_w, place % out_w
            pixel = n * out_h * out_w + place
            q = pixel * groups + g
            for k in range(count):
                y0, y1, a0, a1, da0, da1 = _ends(origin_y[i] + taps[k, 0] + scale * offset[q, k, 0], height)
                z0, z1, b0, b1, db0, db1 = _ends(origin_x[j] + taps[k, 1] + scale * offset[q, k, 1], width)
                y0, y1 = (n * height + y0) * width, (n * height + y1) * width
                q0, q1 = (y0 + z0) * groups + g, (y0 + z1) * groups + g
                q2, q3 = (y1 + z0) * groups + g, (y1 + z1) * groups + g
                dy = grad[(pixel * kept + k * step) * groups + g]
                x0, x1, x2, x3 = x[q0], x[q1], x[q2], x[q3]
                d0 = d1 = d2 = d3 = x.dtype.type(0)
                for c in range(channels):
                    d0 += dy[c] * x0[c]
                    d1 += dy[c] * x1[c]
                    d2 += dy[c] * x2[c]
                    d3 += dy[c] * x3[c]
                m = mask[q, k]
                above, below = b0 * d0 + b1 * d1, b0 * d2 + b1 * d3
                of_mask[q, k] = a0 * above + a1 * below
                of_offset[q, k, 0] = scale * m * (da0 * above + da1 * below)
                of_offset[q, k, 1] = scale * m * (db0 * (a0 * d0 + a1 * d2) + db1 * (a0 * d1 + a1 * d3))
                # One after the other: at the border two of the four may be the same pixel.
                for row, s in ((q0, m * a0 * b0), (q1, m * a0 * b1), (q2, m * a1 * b0), (q3, m * a1 * b1)):
                    dx = of_x[row]
                    for c in range(channels):
                        dx[c] += s * dy[c]
