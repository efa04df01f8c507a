"""The kernels of `_triton.py`, whose docstring says how they compute.

Maps have three axes here and come with five strides: of samples, channels and axes; so do taps, as the map of one
sample, and partial sums of taps, as a sample a part. Other tuples hold one number an axis. Of the k-th channel of taps,
k // spread is the channel that it reads and k // fold the one that it adds to.
"""

import triton
import triton.language as tl


@triton.jit
def unravel(index, size0, size1, size2):
    """Return sample and position of pixels that are counted through all samples."""
    rest = index // size2
    return rest // size1 // size0, rest // size1 % size0, rest % size1, index % size2


@triton.jit
def place(strides, c, i0, i1, i2):
    """Return how far from the first pixel of a sample others lie, for which 32 bits may be too few."""
    far = c.to(tl.int64) * strides[1] + i0.to(tl.int64) * strides[2]
    return far + i1.to(tl.int64) * strides[3] + i2.to(tl.int64) * strides[4]


@triton.jit
def meet(o, u, axis: tl.constexpr, size, padding, stride, dilation, gap):
    """Return which pixels taps u of sums o meet along an axis, and whether there are any."""
    a = o * stride[axis] + u * dilation[axis] - padding[axis]
    return (a // gap[axis]).to(tl.int64), (a >= 0) & (a < size[axis] * gap[axis]) & (a % gap[axis] == 0)


@triton.jit
def segments(index, out, step, COLUMNS: tl.constexpr):
    """Return sample, row and first column of segments; their columns lie `step` apart."""
    pieces = tl.cdiv(tl.cdiv(out[2], step), COLUMNS) * step
    n, o0, o1, piece = unravel(index, out[0], out[1], pieces)
    return n[:, None], o0[:, None], o1[:, None], (piece % step + piece // step * (COLUMNS * step))[:, None]


@triton.jit
def direct_convolve(
    x, weight, bias, y, samples, channels, size, out, padding, x_strides, y_strides, w_strides, w_first,
    kernel: tl.constexpr, stride: tl.constexpr, dilation: tl.constexpr, gap: tl.constexpr,
    spread: tl.constexpr, fold: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write a block of pixels of a block of channels, tap by tap."""
    SUM: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    # Loads of so many taps are under way at once.
    AHEAD: tl.constexpr = kernel[2] if kernel[2] < 8 else 4
    blocks = tl.cdiv(channels, CHANNELS)
    p = tl.program_id(0) // blocks * PIXELS + tl.arange(0, PIXELS)[:, None]
    c = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    n, o0, o1, o2 = unravel(p, out[0], out[1], out[2])
    x += n.to(tl.int64) * x_strides[0]
    total = tl.full((PIXELS, CHANNELS), 0.0, SUM)
    for part in range(fold):
        k = (c * fold + part).to(tl.int64)
        for u0 in range(kernel[0]):
            i0, in0 = meet(o0, u0, 0, size, padding, stride, dilation, gap)
            for u1 in range(kernel[1]):
                i1, in1 = meet(o1, u1, 1, size, padding, stride, dilation, gap)
                row = x + k // spread * x_strides[1] + i0 * x_strides[2] + i1 * x_strides[3]
                inside = in0 & in1 & (n < samples) & (c < channels)
                taps = weight + w_first + k * w_strides[1] + u0 * w_strides[2] + u1 * w_strides[3]
                for u2 in tl.range(0, kernel[2], loop_unroll_factor=AHEAD):
                    i2, in2 = meet(o2, u2, 2, size, padding, stride, dilation, gap)
                    pixels = tl.load(row + i2 * x_strides[4], mask=inside & in2, other=0.0)
                    tap = tl.load(taps + u2 * w_strides[4], mask=c < channels, other=0.0)
                    total += pixels.to(SUM) * tap.to(SUM)
    if bias is not None:
        total += tl.load(bias + c, mask=c < channels, other=0.0).to(SUM)
    at = n.to(tl.int64) * y_strides[0] + place(y_strides, c, o0, o1, o2)
    tl.store(y + at, total, mask=(n < samples) & (c < channels))


@triton.jit
def direct_weight(
    x, grad, parts, samples, channels, size, out, padding, x_strides, g_strides, p_strides,
    kernel: tl.constexpr, stride: tl.constexpr, dilation: tl.constexpr, gap: tl.constexpr,
    spread: tl.constexpr, fold: tl.constexpr, PIXELS: tl.constexpr, TAPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write what some blocks of pixels of some samples add to a block of taps of a block of channels."""
    SUM: tl.constexpr = parts.dtype.element_ty
    blocks = tl.cdiv(channels, CHANNELS)
    t = tl.program_id(0) // blocks * TAPS + tl.arange(0, TAPS)[None, :, None]
    c = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)[None, None, :]
    over, u0, u1, u2 = unravel(t, kernel[0], kernel[1], kernel[2])
    wanted = (over == 0) & (c < channels)
    total = tl.full((PIXELS, TAPS, CHANNELS), 0.0, SUM)
    for block in range(tl.program_id(1), tl.cdiv(out[0] * out[1] * out[2], PIXELS), tl.num_programs(1)):
        p = block * PIXELS + tl.arange(0, PIXELS)[:, None, None]
        behind, o0, o1, o2 = unravel(p, out[0], out[1], out[2])
        i0, in0 = meet(o0, u0, 0, size, padding, stride, dilation, gap)
        i1, in1 = meet(o1, u1, 1, size, padding, stride, dilation, gap)
        i2, in2 = meet(o2, u2, 2, size, padding, stride, dilation, gap)
        x_at, g_at = place(x_strides, c // spread, i0, i1, i2), place(g_strides, c // fold, o0, o1, o2)
        inside = (behind == 0) & (c < channels)
        met = inside & wanted & in0 & in1 & in2
        for n in range(tl.program_id(2).to(tl.int64), samples, tl.num_programs(2)):
            pixels = tl.load(x + n * x_strides[0] + x_at, mask=met, other=0.0)
            grads = tl.load(grad + n * g_strides[0] + g_at, mask=inside, other=0.0)
            total += pixels.to(SUM) * grads.to(SUM)
    part = (tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)).to(tl.int64)
    at = part * p_strides[0] + place(p_strides, c, u0, u1, u2)
    tl.store(parts + at, tl.sum(total, 0, keep_dims=True), mask=wanted)


@triton.jit
def matrix_convolve(
    x, weight, bias, y, samples, channels, size, out, padding, x_strides, y_strides, w_strides, w_first,
    kernel: tl.constexpr, stride: tl.constexpr, dilation: tl.constexpr, gap: tl.constexpr,
    spread: tl.constexpr, fold: tl.constexpr, PRECISION: tl.constexpr,
    SEGMENTS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Write a block of segments of one channel: for every row of taps, windows times a band matrix."""
    c = tl.program_id(0) % channels
    index = tl.program_id(0) // channels * SEGMENTS + tl.arange(0, SEGMENTS)
    n, o0, o1, first = segments(index, out, dilation[2], COLUMNS)
    columns, depth = tl.arange(0, COLUMNS)[None, :], tl.arange(0, DEPTH)
    # Windows begin and end where the first and the last of them meet the map.
    low = tl.maximum((padding[2] - tl.max(first)) // dilation[2], 0)
    last = size[2] - 1 + padding[2] - tl.min(first)
    high = tl.minimum(last // dilation[2] + 1, COLUMNS + kernel[2] - 1)
    x += n.to(tl.int64) * x_strides[0]
    total = tl.full((SEGMENTS, COLUMNS), 0.0, tl.float32)
    for part in range(fold):
        k = (c * fold + part).to(tl.int64)
        for u0 in range(kernel[0]):
            i0, in0 = meet(o0, u0, 0, size, padding, stride, dilation, gap)
            for u1 in range(kernel[1]):
                i1, in1 = meet(o1, u1, 1, size, padding, stride, dilation, gap)
                row = x + k // spread * x_strides[1] + i0 * x_strides[2] + i1 * x_strides[3]
                inside = in0 & in1 & (n < samples)
                taps = weight + w_first + k * w_strides[1] + u0 * w_strides[2] + u1 * w_strides[3]
                for a in range(low, high, DEPTH):
                    i2, in2 = meet(first, (a + depth)[None, :], 2, size, padding, stride, dilation, gap)
                    windows = tl.load(row + i2 * x_strides[4], mask=inside & in2, other=0.0)
                    u2 = (a + depth)[:, None] - columns
                    band = tl.load(taps + u2 * w_strides[4], mask=(u2 >= 0) & (u2 < kernel[2]), other=0.0)
                    total = tl.dot(windows, band, total, input_precision=PRECISION)
    if bias is not None:
        total += tl.load(bias + c).to(tl.float32)
    o2 = first + columns * dilation[2]
    at = n.to(tl.int64) * y_strides[0] + place(y_strides, c, o0, o1, o2)
    tl.store(y + at, total, mask=(n < samples) & (o2 < out[2]))


@triton.jit
def matrix_weight(
    x, grad, parts, samples, channels, size, out, padding, x_strides, g_strides, p_strides,
    kernel: tl.constexpr, stride: tl.constexpr, dilation: tl.constexpr, gap: tl.constexpr,
    spread: tl.constexpr, fold: tl.constexpr, PRECISION: tl.constexpr,
    SEGMENTS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Write what some blocks of segments of some samples add to taps of one row: diagonals of a matrix product."""
    # Windows of so many pixels hold this many taps whole.
    whole: tl.constexpr = DEPTH - COLUMNS + 1
    c, rest = tl.program_id(0) % channels, tl.program_id(0) // channels
    block_of_taps, u0, u1, _ = unravel(rest, kernel[0], kernel[1], 1)
    columns, depth = tl.arange(0, COLUMNS)[None, :], tl.arange(0, DEPTH)
    v = block_of_taps * whole + depth
    rows = out[0] * out[1] * tl.cdiv(tl.cdiv(out[2], dilation[2]), COLUMNS) * dilation[2]
    total = tl.full((DEPTH, COLUMNS), 0.0, tl.float32)
    for block in range(tl.program_id(1), tl.cdiv(rows, SEGMENTS), tl.num_programs(1)):
        index = block * SEGMENTS + tl.arange(0, SEGMENTS)
        over, o0, o1, first = segments(index, out, dilation[2], COLUMNS)
        o2 = first + columns * dilation[2]
        i0, in0 = meet(o0, u0, 0, size, padding, stride, dilation, gap)
        i1, in1 = meet(o1, u1, 1, size, padding, stride, dilation, gap)
        i2, in2 = meet(first, v[None, :], 2, size, padding, stride, dilation, gap)
        x_at, g_at = place(x_strides, c // spread, i0, i1, i2), place(g_strides, c // fold, o0, o1, o2)
        met, inside = (over == 0) & in0 & in1 & in2, (over == 0) & (o2 < out[2])
        for n in range(tl.program_id(2).to(tl.int64), samples, tl.num_programs(2)):
            windows = tl.load(x + n * x_strides[0] + x_at, mask=met, other=0.0)
            grads = tl.load(grad + n * g_strides[0] + g_at, mask=inside, other=0.0)
            total = tl.dot(tl.trans(windows), grads, total, input_precision=PRECISION)
    # The tap that column j meets at the j-th pixel behind v is v.
    diagonals = tl.gather(total, (depth[:, None] + columns) % DEPTH, 0)
    part = (tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)).to(tl.int64)
    at = part * p_strides[0] + place(p_strides, c, u0, u1, v)
    tl.store(parts + at, tl.sum(diagonals, 1), mask=(depth < whole) & (v < kernel[2]))
