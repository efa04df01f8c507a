"""The loops of the sliding convolution around those of `_registers`, compiled by numba."""

from numba import njit

from omniconv.ops._simd import VECTOR
from omniconv.ops.conv._registers import call_sums


@njit(nogil=True)
def convolve(begin, end, x, weight, y, dilation0, dilation1, groups, loops, count):
    """Convolve rows `begin` to `end` of y (N, O, H, W), at least `count` vectors wide, with padded maps x."""
    _, out, height, width = y.shape
    _, channels, kernel0, kernel1 = weight.shape
    size = y.itemsize
    block = count * VECTOR // size
    for row in range(begin, end):
        n, o, i = row // (out * height), row // height % out, row % height
        first = o // (out // groups) * channels
        pixels = x.ctypes.data + n * x.strides[0] + first * x.strides[1] + i * x.strides[2]
        j = 0
        while j < width:
            # The last outputs may be computed twice.
            j = min(j, width - block)
            call_sums(
                loops, y.ctypes.data + (row * width + j) * size, VECTOR,
                pixels + j * size, VECTOR, weight.ctypes.data + o * weight.strides[0],
                channels, x.strides[1], weight.strides[1],
                kernel0, dilation0 * x.strides[2], weight.strides[2], kernel1, dilation1 * size, size,
            )  # fmt: skip
            j += block
