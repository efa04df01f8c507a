"""Long convolution layer: soft thresholds, smoothing against a plain average, and butterflies against the FFT."""

import pytest
import torch

from omniconv.layers.sequence.long_conv import Butterfly, LongConv, smooth, squash
from omniconv.ops.long_conv.monarch import transform


def test_squash_is_the_soft_threshold():
    kernel = torch.tensor([[0.5, 0.2, 0.1, 0.0, -0.1, -0.2, -0.5]])
    wanted = torch.tensor([[0.3, 0.0, 0.0, 0.0, 0.0, 0.0, -0.3]])
    torch.testing.assert_close(squash(kernel, 0.2), wanted)


def test_smoothing_averages_neighbours_of_time_and_of_frequency():
    kernel = torch.randn(2, 12, dtype=torch.float64)
    for i in range(12):
        window = kernel[:, max(0, i - 1) : i + 2]
        torch.testing.assert_close(smooth(kernel, 3, "time")[:, i], window.sum(1) / 3)
    found, spectrum = torch.fft.rfft(smooth(kernel, 3, "frequency")), torch.fft.rfft(kernel)
    for i in range(1, 6):
        torch.testing.assert_close(found[:, i], spectrum[:, i - 1 : i + 2].sum(1) / 3)


@pytest.mark.parametrize(("points", "order"), [(64, 1), (64, 2), (512, 3), (24, 2)])
def test_a_butterfly_starts_as_the_fourier_transform(points, order):
    layer = Butterfly(points, order, dtype=torch.float64)
    z = torch.randn(3, points, dtype=torch.complex128)
    f = torch.view_as_complex(layer(torch.view_as_real(z)))
    torch.testing.assert_close(f, transform(z, layer.factors))
    # The frequencies are sorted differently.
    torch.testing.assert_close(f.abs().sort().values, torch.fft.fft(z).abs().sort().values)


def test_a_butterfly_has_as_many_weights_as_the_paper_says():
    for points, order in ((64, 2), (512, 3)):
        weights = sum(p.numel() for p in Butterfly(points, order).parameters()) // 2
        assert weights == round(order * points ** ((order + 1) / order))


def test_learned_transforms_start_as_the_plain_layer_and_then_learn():
    learned = LongConv(3, 40, butterfly=2, dtype=torch.float64)
    torch.nn.init.normal_(learned.kernel)
    plain = LongConv(3, 40, dtype=torch.float64)
    plain.load_state_dict(learned.state_dict(), strict=False)
    x = torch.randn(2, 3, 40, dtype=torch.float64)
    torch.testing.assert_close(learned(x), plain(x))
    learned(x).square().sum().backward()
    for transform_ in learned.transforms:
        assert all(p.grad.abs().max() > 0 for p in transform_.parameters())


@pytest.mark.parametrize("bidirectional", [False, True])
def test_only_a_bidirectional_layer_sees_the_future(bidirectional):
    layer = LongConv(2, 16, bidirectional=bidirectional, dtype=torch.float64)
    torch.nn.init.normal_(layer.kernel)
    x = torch.randn(1, 2, 16, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x)[..., 7].sum(), x)
    seen = gradient.abs().amax((0, 1)) > 1e-12
    assert bool(seen[:8].all())
    assert bool(seen[8:].all()) == bidirectional
    assert bool(seen[8:].any()) == bidirectional


def test_taps_drop_out_in_training_only():
    layer = LongConv(4, 200, squash=0.0, dropout=0.5)
    assert 0.3 < (layer.train().taps() == 0).double().mean() < 0.7
    assert bool((layer.eval().taps() != 0).all())


def test_decaying_kernels_start_loud_and_end_quiet():
    layer = LongConv(64, 1000, init="decay")
    assert layer.kernel[-1, :20].std() > 5 * layer.kernel[-1, 200:].std()
    assert layer.kernel[0].std() > 3 * layer.kernel[-1].std()
