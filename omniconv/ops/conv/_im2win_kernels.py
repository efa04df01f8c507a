"""The loops of the convolution by windows around those of `_registers`, compiled by numba."""

from numba import njit

from omniconv.ops._simd import VECTOR
from omniconv.ops.conv._registers import call_sums


@njit(nogil=True)
def convolve(begin, end, lowered, weight, y, step, loops, count):
    """Convolve rows `begin` to `end` of y (N, H, W, O), whole vectors of output channels.

    A window is the slice of `weight.shape[1]` numbers from j * step on of every row of lowered (N, S, H, L). `count`
    windows, at most W, are multiplied at a time, each number of theirs with a vector of output channels.
    """
    _, height, width, out = y.shape
    slices, taps, _ = weight.shape
    size = y.itemsize
    for row in range(begin, end):
        n, i = row // height, row % height
        windows = lowered.ctypes.data + n * lowered.strides[0] + i * lowered.strides[2]
        for o in range(0, out, VECTOR // size):
            j = 0
            while j < width:
                # The last windows may be computed twice.
                j = min(j, width - count)
                call_sums(
                    loops, y.ctypes.data + ((row * width + j) * out + o) * size, out * size,
                    windows + j * step * size, step * size, weight.ctypes.data + o * size,
                    1, 0, 0, slices, lowered.strides[1], weight.strides[0], taps, size, weight.strides[1],
                )  # fmt: skip
                j += count
