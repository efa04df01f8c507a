"""The loops of the grouped n:m product, compiled by numba; LLVM turns those over columns into vectors."""

from numba import njit


@njit(nogil=True, cache=True, fastmath={"contract"})
def multiply(begin, end, values, rows, patterns, m, b, y, tile):
    """Add to pieces `begin` to `end` of y (a chunk of rows by `tile` columns each) their products.

    The rows of b that a pattern names are read once for all g rows that share it.
    """
    _, blocks, count, g, n = values.shape
    tiles = -(-y.shape[1] // tile)
    for piece in range(begin, end):
        c, first = piece // tiles, piece % tiles * tile
        last = min(y.shape[1], first + tile)
        for k in range(blocks):
            for p in range(count):
                for i in range(n):
                    column = k * m + patterns[p, i]
                    if column >= b.shape[0]:
                        continue
                    source = b[column, first:last]
                    for q in range(g):
                        row = y[c * count * g + rows[c, k, p, q], first:last]
                        value = values[c, k, p, q, i]
                        for j in range(last - first):
                            row[j] += value * source[j]
