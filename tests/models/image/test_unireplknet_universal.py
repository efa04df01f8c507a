"""Front ends: every pixel of a map is the piece of data that it is said to be."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from omniconv.models.image.unireplknet import UniRepLKNet, UniRepLKNetConfig
from omniconv.models.image.unireplknet_universal import (
    DepthViews,
    Forecaster,
    FrameTiles,
    LogMel,
    SeriesMap,
    UniversalUniRepLKNet,
)

TINY = UniRepLKNetConfig((1, 1), (8, 12), 5, (0, 1))


def test_a_column_of_sound_depends_on_its_samples_and_no_others():
    front = LogMel(8000, 16, 64, 24)
    x = torch.randn(1, 400, requires_grad=True)
    y = front(x)
    assert y.shape == (1, 1, 16, 15)
    (gradient,) = torch.autograd.grad(y[0, 0, :, 7].sum(), x)
    samples = set(gradient[0].nonzero().flatten().tolist())
    inside = front.samples(7)
    assert samples <= set(inside)
    assert len(samples) >= len(inside) - 1  # a Hann window begins with zero
    assert front.samples(14).stop <= 400 < front.samples(15).stop


def test_log_mel_by_its_definition():
    """Triangles between equally spaced corners of 2595 log10(1 + f / 700), over the energies of the DFT."""
    front = LogMel(8000, 4, 32, 16)
    x = torch.randn(1, 48)
    corners = [700 * (10 ** (i * 2595 * np.log10(1 + 4000 / 700) / 5 / 2595) - 1) for i in range(6)]
    mel = [2595 * np.log10(1 + c / 700) for c in corners]
    for column in range(2):
        samples = x[0].numpy()[column * 16 : column * 16 + 32] * (
            0.5 - 0.5 * np.cos(2 * np.pi * np.arange(32) / 32)
        )
        energy = [abs(sum(samples * np.exp(-2j * np.pi * k * np.arange(32) / 32))) ** 2 for k in range(17)]
        for band in range(4):
            total = 1e-6
            for k in range(17):
                m = 2595 * np.log10(1 + k * 250 / 700)
                low, middle, high = mel[band : band + 3]
                total += energy[k] * max(0, min((m - low) / (middle - low), (high - m) / (high - middle)))
            assert float(front(x)[0, 0, band, column]) == pytest.approx(np.log(total), rel=1e-4, abs=1e-4)


def test_every_pixel_of_tiled_frames_is_the_named_one():
    x = torch.randn(2, 6, 3, 4, 5)
    front = FrameTiles(3)
    y = front(x)
    assert y.shape == (2, 3, 8, 15)
    for row in range(8):
        for column in range(15):
            frame, i, j = front.pixel(row, column, 4, 5)
            assert torch.equal(y[:, :, row, column], x[:, frame, :, i, j])
    with pytest.raises(ValueError, match="columns must divide the number of frames: got 4 and 6"):
        FrameTiles(4)(x)


def test_every_pixel_of_a_depth_picture_is_the_nearest_of_its_points():
    x = torch.rand(2, 40, 3) * 2 - 1
    front = DepthViews(4)
    y, shown = front(x), front.points(x)
    for n in range(2):
        for view in range(3):
            best = {}
            for p, point in enumerate(x[n].tolist()):
                cell = [min(3, int((c + 1) / 2 * 4)) for c in point]
                key = cell[(view + 1) % 3], cell[(view + 2) % 3]
                if key not in best or point[view] > x[n, best[key], view]:
                    best[key] = p
            for i in range(4):
                for j in range(4):
                    point = best.get((i, j), -1)
                    assert shown[n, view, i, j] == point
                    near = 0.0 if point < 0 else (float(x[n, point, view]) + 1) / 2
                    assert float(y[n, view, i, j]) == pytest.approx(near)


def test_every_pixel_of_a_series_is_an_entry_of_a_step():
    torch.manual_seed(0)
    front = SeriesMap(3, 6, width=9)
    x = torch.randn(2, 12, 3)
    y = front(x)
    assert y.shape == (2, 1, 8, 9)
    padded = torch.cat([x[:, -1:], x, x[:, :1]], 1)
    for row in range(8):
        for column in range(9):
            step, entry = front.step(row, column)
            expected = torch.einsum(
                "ndk,dk->n", padded[:, step : step + 3].transpose(1, 2), front.token.weight[entry]
            )
            torch.testing.assert_close(y[:, 0, row, column], expected)


def test_one_network_takes_every_modality_and_merges():
    torch.manual_seed(0)
    for front, data in (
        (LogMel(8000, 32, 64, 32), torch.randn(2, 1100)),
        (FrameTiles(2, 1), torch.randn(2, 4, 1, 16, 16)),
        (DepthViews(32), torch.rand(2, 50, 3)),
        (SeriesMap(7, 32), torch.randn(2, 48, 7)),
    ):
        model = UniversalUniRepLKNet(front, TINY, 5).eval()
        assert model(data).shape == (2, 5)
        torch.testing.assert_close(model.deploy()(data), model(data), rtol=1e-4, atol=1e-5)


def test_a_forecast_follows_scale_and_level_and_keeps_nodes_apart():
    torch.manual_seed(0)
    model = Forecaster(5, TINY, embedding=16).double().eval()
    x = torch.randn(3, 32, 2, dtype=torch.float64)
    y = model(x)
    assert y.shape == (3, 5, 2)
    torch.testing.assert_close(model(1000 * x + 7), 1000 * y + 7, rtol=1e-4, atol=1e-2)
    x[:, :, 1] = 0
    torch.testing.assert_close(model(x)[:, :, 0], y[:, :, 0])
    with pytest.raises(ValueError, match="width must divide steps times embedding: got 7, 32 and 4"):
        SeriesMap(2, 4, 7)(x)


@pytest.mark.parametrize("option", ["gate", "reparam"])
def test_the_design_rules_are_switches(option):
    torch.manual_seed(0)
    whole, without = (UniRepLKNet(replace(TINY, **options)) for options in ({}, {option: False}))
    lost = set(whole.state_dict()) - set(without.state_dict())
    assert lost
    assert all((".se." if option == "gate" else "dwconv.") in name for name in lost)
    x = torch.randn(1, 3, 33, 47)
    torch.testing.assert_close(without.eval().deploy()(x), without(x), rtol=1e-4, atol=1e-5)
