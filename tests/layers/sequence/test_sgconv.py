"""SGConv against direct sums with a kernel put together tap by tap, and against itself chunk by chunk."""

import numpy as np
import pytest
import torch

from omniconv.layers.sequence.sgconv import SGConv, sgconv_scales


def enlarged(taps: np.ndarray, factor: int, how: str) -> np.ndarray:
    """Each of `factor` samples a tap sits at the middle of its share of the tap's width."""
    places = (np.arange(len(taps) * factor) + 0.5) / factor - 0.5
    if how == "nearest":
        return taps[np.round(places).astype(int)]
    return np.interp(places, np.arange(len(taps)), taps)


def slow_kernel(weight: np.ndarray, alpha: float, how: str, overlap: bool) -> np.ndarray:
    """The kernel of one channel before it is divided by Z."""
    count, size = weight.shape
    kernel = np.zeros(size * 2 ** (count - 1))
    for i in range(count):
        factor = 2**i if overlap else 2 ** max(i - 1, 0)
        start = 0 if overlap or i == 0 else size * factor
        kernel[start : start + size * factor] += alpha**i * enlarged(weight[i], factor, how)
    return kernel


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("how", ["linear", "nearest"])
def test_the_kernel_is_made_of_enlarged_and_fading_pieces(how, overlap):
    torch.manual_seed(0)
    layer = SGConv(3, 60, 5, decay=(0.4, 0.8), upsampling=how, overlap=overlap, dtype=torch.float64)
    drawn = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.add_(torch.randn_like(layer.weight))
    for c, alpha in enumerate((0.4, 0.6, 0.8)):
        at_start, now = (
            slow_kernel(w[0, c].numpy(), alpha, how, overlap) for w in (drawn, layer.weight.detach())
        )
        np.testing.assert_allclose(
            layer.kernel()[c].detach().numpy(), now / np.linalg.norm(at_start), atol=1e-6
        )


@pytest.mark.parametrize("length", [3, 40, 90])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_outputs_are_direct_sums(bidirectional, length):
    torch.manual_seed(0)
    layer = SGConv(2, 40, 5, bidirectional=bidirectional).double()
    x = torch.randn(1, 2, length, dtype=torch.float64)
    directions = layer._directions().detach().numpy()
    y = layer.skip.detach().numpy()[:, None] * x[0].numpy()
    for c in range(2):
        for t in range(length):
            for lag, tap in enumerate(directions[0, c]):
                y[c, t] += tap * x[0, c, t - lag].item() if lag <= t else 0.0
            for lag, tap in enumerate(directions[1, c] if bidirectional else (), start=1):
                y[c, t] += tap * x[0, c, t + lag].item() if t + lag < length else 0.0
    np.testing.assert_allclose(layer(x)[0].detach().numpy(), y, atol=1e-12)


@pytest.mark.parametrize("block", [1, 5, 30])
def test_streamed_blocks_equal_the_whole(block):
    torch.manual_seed(0)
    layer = SGConv(3, 16, 4).double()
    x = torch.randn(2, 3, 30, dtype=torch.float64)
    stream = layer.stream(block)
    pieces = [stream(piece) for piece in x.split(block, -1)]
    torch.testing.assert_close(torch.cat(pieces, -1), layer(x).detach())


def test_a_bidirectional_layer_does_not_stream():
    with pytest.raises(ValueError, match="a bidirectional SGConv cannot stream; use bidirectional=False"):
        SGConv(3, 16, 4, bidirectional=True).stream()


def test_doubling_the_length_adds_one_sub_kernel():
    for exponent in range(6, 17):
        assert sgconv_scales(2**exponent, 64) == exponent - 5
        assert SGConv(2, 2**exponent, 64).weight.numel() == 2 * 64 * (exponent - 5)
    assert sgconv_scales(65, 64) == 2
    assert sgconv_scales(10, 64) == 1


def test_new_kernels_have_unit_norm():
    layer = SGConv(5, 300, 16)
    torch.testing.assert_close(layer.kernel().norm(dim=-1), torch.ones(5))


def test_maps_are_read_row_by_row():
    torch.manual_seed(0)
    layer = SGConv(3, 35, 4, bidirectional=True)
    x = torch.randn(2, 3, 5, 7)
    torch.testing.assert_close(layer(x), layer(x.flatten(2)).reshape(2, 3, 5, 7))
