"""Long convolution against direct sums of torch and SciPy, and its own promises: causal, bounded, exact gradients."""

import pytest
import torch
from scipy.signal import convolve2d
from torch.nn import functional as F

from omniconv.ops.dispatch import explain
from omniconv.ops.long_conv import _chunked, _torch, monarch
from omniconv.ops.long_conv.api import long_conv
from omniconv.ops.long_conv.stream import LongConvStream

IMPLS = ("auto", "torch", "chunked", "depthwise", "monarch")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def direct(x, kernel, origin: int):
    """The sum itself by torch's convolution, which slides the flipped kernel."""
    k = kernel.shape[1]
    padded = F.pad(x, (k - 1 - origin, origin))
    return F.conv1d(padded, kernel.flip(1)[:, None], groups=x.shape[1])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("length", "taps"), [(1, 1), (2, 5), (31, 31), (64, 7), (97, 200), (250, 250)])
def test_causal_and_bidirectional_equal_the_direct_sum(impl, length, taps):
    x, kernel = normal(3, 2, length), normal(2, taps, seed=1)
    torch.testing.assert_close(long_conv(x, kernel, impl=impl), direct(x, kernel, 0), rtol=0, atol=1e-10)
    both = long_conv(x, kernel, bidirectional=True, impl=impl)
    torch.testing.assert_close(both, direct(x, kernel, taps // 2), rtol=0, atol=1e-10)


def test_maps_equal_scipy():
    x, kernel = normal(2, 2, 9, 6), normal(2, 9, 6, seed=1)
    for bidirectional in (False, True):
        top, left = (4, 3) if bidirectional else (0, 0)
        y = long_conv(x, kernel, bidirectional=bidirectional)
        for n in range(2):
            for c in range(2):
                whole = torch.from_numpy(convolve2d(x[n, c].numpy(), kernel[c].numpy()))
                torch.testing.assert_close(y[n, c], whole[top : top + 9, left : left + 6])


def test_halves_of_a_bidirectional_kernel():
    x, past, future = normal(1, 2, 20), normal(2, 20, seed=1), normal(2, 20, seed=2)
    future[:, 0] = past[:, 0]
    both = long_conv(x, torch.cat([future.flip(-1)[..., :-1], past], -1), bidirectional=True)
    ahead = long_conv(x.flip(-1), future).flip(-1)
    torch.testing.assert_close(both, long_conv(x, past) + ahead - past[:, :1] * x)


def test_skip_and_gates_are_those_of_hyena():
    x, before, after, kernel, skip = (
        normal(*shape, seed=i) for i, shape in enumerate([(2, 3, 17)] * 3 + [(3, 17), (3,)])
    )
    expected = after * (direct(before * x, kernel, 0) + skip[:, None] * before * x)
    for impl in IMPLS:
        y = long_conv(x, kernel, skip, gate_in=before, gate_out=after, impl=impl)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_future_has_no_influence_beyond_rounding(impl):
    x, kernel = normal(2, 2, 101), normal(2, 101, seed=1)
    other = x.clone()
    other[..., 60:] += 1e3
    change = (long_conv(other, kernel, impl=impl) - long_conv(x, kernel, impl=impl)).abs()
    assert change[..., :60].max() < 1e-13 * 1e3 * kernel.abs().sum(1).max()
    assert change[..., 60:].amax() > 1


@pytest.mark.parametrize("impl", ["torch", "chunked", "monarch"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(impl, dtype):
    x, kernel = normal(2, 2, 1000).to(dtype), normal(2, 1000, seed=1).to(dtype)
    exact = long_conv(x.double(), kernel.double())
    y = long_conv(x, kernel, impl=impl)
    assert y.dtype == dtype
    # One rounding of the result, and float32's error of a transform of large numbers.
    limit = torch.finfo(dtype).eps * exact.abs() / 2 + 2e-6 * exact.abs().max()
    assert bool(((y.double() - exact).abs() <= limit).all())


@pytest.mark.parametrize("form", [_chunked.convolve, _chunked.by_matrices])
@pytest.mark.parametrize("workspace", [1, 2**15, 2**17, 2**30])
def test_chunks_of_any_size_give_the_same(monkeypatch, workspace, form):
    x, kernel, grad = normal(5, 7, 60), normal(7, 60, seed=1), normal(5, 7, 60, seed=2)
    origin = (3,)
    leaves = [x.requires_grad_(), kernel.requires_grad_()]
    wanted = _torch.convolve(x, kernel, origin)
    expected = torch.autograd.grad(wanted, leaves, grad)
    monkeypatch.setitem(_chunked.WORKSPACE, "cpu", workspace)
    y = form(x, kernel, origin)
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(torch.autograd.grad(y, leaves, grad), expected)


def test_workspace_does_not_grow_with_the_batch(monkeypatch):
    taken: list[int] = []
    spectrum = _torch.spectrum

    def recorded(x, sizes):
        f = spectrum(x, sizes)
        taken.append(f.numel() * f.element_size())
        return f

    monkeypatch.setattr(_torch, "spectrum", recorded)
    most = []
    for n, c in ((8, 128), (16, 256)):
        x, kernel = torch.zeros(n, c, 2048), torch.zeros(c, 2048, requires_grad=True)
        x.requires_grad_()
        taken.clear()
        long_conv(x, kernel).sum().backward()
        most.append(max(taken))
    assert most[0] == most[1] <= _chunked.WORKSPACE["cpu"] / 2


def test_only_maps_and_kernels_are_saved():
    x = torch.zeros(8, 64, 4096, requires_grad=True)
    kernel = torch.zeros(64, 4096, requires_grad=True)
    assert explain(long_conv, x, kernel).chosen == "chunked"
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        long_conv(x, kernel)
    assert sorted(saved) == sorted([x.data_ptr(), kernel.data_ptr()])


@pytest.mark.parametrize("n", [1, 5, 17, 121, 511, 1000, 2047, 16385])
def test_fast_lengths_are_the_least_smooth_multiples_of_four(n):
    smooth = [2**a * 3**b * 5**c for a in range(2, 18) for b in range(11) for c in range(8)]
    assert _torch.fast_length(n) == min(m for m in smooth if m >= n)


def frequencies(ns: list[int]) -> torch.Tensor:
    if len(ns) == 1:
        return torch.arange(ns[0])
    return (torch.arange(ns[0])[:, None] + ns[0] * frequencies(ns[1:])[None]).flatten()


@pytest.mark.parametrize("ns", [[7], [4, 4], [3, 8], [4, 5, 6], [8, 8, 8], [2, 3, 4, 5]])
def test_monarch_factors_are_the_fourier_matrix(ns):
    n = torch.tensor(ns).prod()
    z = torch.complex(normal(3, n), normal(3, n, seed=1))
    f = monarch.transform(z, ns)
    torch.testing.assert_close(f, torch.fft.fft(z)[:, frequencies(ns)])
    torch.testing.assert_close(monarch.inverse(f, ns), z)


@pytest.mark.parametrize(
    ("n", "order", "wanted"), [(4096, 2, [64, 64]), (2048, 2, [32, 64]), (4096, 3, [16, 16, 16])]
)
def test_factors_are_balanced(n, order, wanted):
    assert monarch.factors(n, order) == wanted


@pytest.mark.parametrize(("taps", "block"), [(50, 8), (8, 8), (3, 16), (33, 1), (64, 100)])
def test_a_stream_equals_the_whole(taps, block):
    x, kernel, skip = normal(2, 3, 5 * block), normal(3, taps, seed=1), normal(3, seed=2)
    stream = LongConvStream(kernel, skip, block=block)
    for _ in range(2):
        blocks = torch.cat([stream(part) for part in x.split(block, 2)], 2)
        torch.testing.assert_close(blocks, long_conv(x, kernel, skip))
        stream.reset()


def test_a_stream_refuses_other_blocks():
    stream = LongConvStream(normal(3, 9), block=4)
    with pytest.raises(ValueError, match=r"x must be \(2, 3, 4\), one block a call: got \(2, 3, 5\)"):
        stream(normal(2, 3, 5))
    with pytest.raises(ValueError, match="block must be positive: got 0"):
        LongConvStream(normal(3, 9), block=0)
