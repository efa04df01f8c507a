"""The range coder as two loops over integers, which Python runs as they are and numba compiles as they are.

Paper: Martin, Range encoding, 1979; carries run back into bytes already written, so nothing is ever cut off. A
message is a number in [0, 1) in base 256, and every symbol narrows the interval in which it lies:

    low, span  ->  low + span * start,  span * width

with `start` and `width` in units of 2^-16. `low` and `span` are held in 48 bits and shifted a byte to the left
whenever 40 bits are enough for the span, so a symbol costs at most 2^-24 of its share more than its probability says.
Every number stays below 2^63: the bytes are the same on every machine, compiled or not. First symbol in, first out.
"""

__all__ = ["decode", "encode"]

_TOP, _BOTTOM = 1 << 48, 1 << 40


def encode(starts, widths, out):
    """Write the message of all intervals into `out` and return how many bytes it takes.

    Args:
        starts: beginning of each interval, in units of 2^-16.
        widths: its width, at least 1.
        out: bytes to write, of at least `2 * len(starts) + 8`.
    """
    low, span, count = 0, _TOP, 0
    for index in range(len(starts) + 1):
        if index < len(starts):
            unit = span >> 16
            low += unit * starts[index]
            span = unit * widths[index]
        else:
            low += _BOTTOM - 1  # the next multiple of 2^40 lies in the interval: its first byte says all
        if low >= _TOP:
            low -= _TOP
            at = count - 1
            while out[at] == 255:
                out[at] = 0
                at -= 1
            out[at] += 1
        while span < _BOTTOM:
            out[count] = low >> 40
            count += 1
            low = (low << 8) & (_TOP - 1)
            span <<= 8
    out[count] = low >> 40
    return count + 1


def decode(data, rows, cdfs, sizes, lowest, out):
    """Read one number for each of `rows` into `out`; behind its end a message reads as zeros.

    Args:
        data: bytes of the message.
        rows: which table each number was coded with.
        cdfs: of each table, where its symbols begin, and 2^16 at the end.
        sizes: symbols of each table; the last one says that a number of 32 bits follows, in two halves.
        lowest: number for which the first symbol of each table stands.
        out: numbers to write.
    """
    code, span, position = 0, _TOP, 0
    while position < 6:
        code = code << 8 | (data[position] if position < len(data) else 0)
        position += 1
    index = halves = 0
    while index < len(rows):
        row = rows[index]
        unit = span >> 16
        value = min(code // unit, 65535)
        if halves:
            start, width = value, 1
            out[index] = out[index] << 16 | value
            halves -= 1
            if halves == 0:
                out[index] -= 1 << 31
        else:
            symbol, end = 0, sizes[row] - 1
            while symbol < end:
                middle = (symbol + end + 1) >> 1
                if cdfs[row][middle] <= value:
                    symbol = middle
                else:
                    end = middle - 1
            start = cdfs[row][symbol]
            width = cdfs[row][symbol + 1] - start
            out[index] = lowest[row] + symbol
            if symbol == sizes[row] - 1:
                out[index] = 0
                halves = 2
        if halves == 0:
            index += 1
        # Bytes that no encoder wrote may point behind the last interval; they must not make `code` grow.
        span = unit * width
        code = min(code - unit * start, span - 1)
        while span < _BOTTOM:
            code = code << 8 | (data[position] if position < len(data) else 0)
            position += 1
            span <<= 8
