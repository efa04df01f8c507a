"""Compiled forward substitution: pixel by pixel, each number one scalar product for every row of the kernel."""

import numba


@numba.njit(nogil=True, cache=True, fastmath={"contract", "reassoc", "nsz"})
def substitute(begin, end, x, matrix):
    """Solve for samples `begin` to `end` in place.

    Args:
        begin: first sample.
        end: beyond the last.
        x: maps (N, H + kh - 1, W + kw - 1, C) of L^-1 y, zero above and to the left of it.
        matrix: L^-1 W (kh, C, kw C); columns go with the channels of the pixels side by side that a row covers.
    """
    rows, channels, covered = matrix.shape
    _, height, width, _ = x.shape
    right = covered - channels
    for n in range(begin, end):
        flat = x[n].reshape(height, width * channels)
        for i in range(rows - 1, height):
            for j in range(0, width * channels - right, channels):
                here = flat[i, j + right : j + covered]
                for a in range(rows):
                    # The pixel itself, the last that the last row covers, is not among the known.
                    known = covered if a < rows - 1 else right
                    around = flat[i + 1 - rows + a, j : j + known]
                    for o in range(channels):
                        taps = matrix[a, o]
                        total = taps[0] * 0
                        for c in range(known):
                            total += taps[c] * around[c]
                        here[o] -= total
