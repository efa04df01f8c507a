"""Spectra against waves and closed forms of filters."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from omniconv.inspect.spectra import band_noise, band_robustness, feature_spectra, log_amplitude


def test_a_delta_is_white_and_a_box_filter_is_known():
    delta = torch.zeros(1, 2, 8, 12, dtype=torch.float64)
    delta[:, :, 3, 5] = 1.0
    torch.testing.assert_close(log_amplitude(delta), torch.zeros(5, dtype=torch.float64))
    # Filtering with (1, 2, 1) / 4 in both directions multiplies by cos^4(f / 2) on the diagonal.
    kernel = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
    square = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    square[:, :, 4, 4] = 1.0
    blurred = F.conv2d(F.pad(square, (1,) * 4), (kernel[:, None] * kernel)[None, None])
    expected = [4 * math.log(math.cos(math.pi * k / 8)) for k in range(4)]
    torch.testing.assert_close(
        log_amplitude(blurred)[:4], torch.tensor(expected, dtype=torch.float64), atol=1e-4, rtol=0
    )


def test_feature_spectra_keep_order_and_variance():
    smooth, rough = torch.ones(2, 3, 6, 6), torch.randn(2, 3, 7, 9)
    spectra = feature_spectra({"a": smooth, "b": rough}, frequencies=5)
    assert spectra.data["layer"].tolist() == ["a", "b"]
    assert spectra.data["amplitude"].shape == (2, 5)
    assert spectra.high[0] < -10 < spectra.high[1]
    np.testing.assert_allclose(spectra.data["variance"], [0, rough.var((2, 3)).mean().item()], rtol=1e-5)
    assert len(spectra.plot().axes) == 3


def test_noise_stays_in_its_band():
    x = torch.zeros(2, 1, 16, 12, dtype=torch.float64)
    noisy = band_noise(x, 0.25, 0.5, 0.3)
    torch.testing.assert_close(noisy.square().mean((1, 2, 3)).sqrt(), torch.full((2,), 0.3).double())
    energy = torch.fft.fft2(noisy).abs().mean((0, 1))
    rows = torch.fft.fftfreq(16).abs() * 2
    columns = torch.fft.fftfreq(12).abs() * 2
    frequency = torch.maximum(rows[:, None], columns)
    inside = (frequency >= 0.25) & (frequency < 0.5)
    assert energy[inside].min() > 0
    assert energy[~inside].max() < 1e-12
    with pytest.raises(ValueError, match="must fulfil 0 <= low < high <= 1"):
        band_noise(x, 0.5, 0.5, 1.0)


def test_a_low_pass_classifier_fears_low_frequencies_only():
    model = nn.Sequential(nn.AvgPool2d(8), nn.Flatten()).train()
    x = torch.randn(400, 2, 8, 8)
    labels = model(x).argmax(1)
    found = band_robustness(model, x, labels, bands=4, strength=3.0)
    assert found.data["clean"] == 1
    # Bands without frequency 0 have no mean.
    assert found.data["accuracy"][0] < 0.95
    assert (found.data["accuracy"][1:] > 0.99).all()
    assert model.training
    assert found.plot().axes
