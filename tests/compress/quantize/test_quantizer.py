import itertools

import pytest
import torch

from omniconv.compress.quantize.formats import Binary, Codebook, Float, Integer, PowerOfTwo
from omniconv.compress.quantize.quantizer import Quantizer, Scheme
from omniconv.compress.quantize.ranges import RANGES


def made(x, scheme, axis=0):
    quantizer = Quantizer(scheme, axis)
    quantizer.calibrate(x)
    return quantizer


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(6, 5, 3) * torch.logspace(-1, 1, 6)[:, None, None] + 0.2


@pytest.mark.parametrize(("axis", "symmetric"), [(0, True), (1, False)])
def test_it_is_torch_s_fake_quantization(x, axis, symmetric):
    scheme = Scheme(Integer(5, signed=symmetric), symmetric, "channel")
    quantizer = made(x, scheme, axis)
    zero = torch.zeros(x.shape[axis]) if symmetric else quantizer.zero.flatten()
    low, high = int(quantizer.grid[0]), int(quantizer.grid[-1])
    theirs = torch.fake_quantize_per_channel_affine(x, quantizer.scale.flatten(), zero.int(), axis, low, high)
    torch.testing.assert_close(quantizer(x), theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "form", [Integer(4), Float(2, 1), PowerOfTwo(4), Codebook(3), Binary(), Float(4, 3, 1)], ids=str
)
@pytest.mark.parametrize("per", ["tensor", "channel", 4])
def test_every_value_is_the_nearest_of_its_range(x, form, per):
    quantizer = made(x, Scheme(form, per=per, range="mse"))
    y, rows = quantizer(x), quantizer.rows(x)
    for row, scale, got in zip(rows, quantizer.scale, quantizer.rows(y), strict=True):
        distance = (row[:, None] - quantizer.grid * scale).abs()
        values = row != 0 if per == 4 else torch.ones_like(row, dtype=torch.bool)
        torch.testing.assert_close((row - got).abs()[values], distance.amin(1)[values], rtol=1e-4, atol=1e-6)
    assert torch.equal(quantizer.restore(rows, x.shape), x)
    torch.testing.assert_close(quantizer.decode(quantizer.encode(x)), y)
    assert quantizer.encode(x).amax() < 2**form.bits
    assert torch.equal(quantizer.encode(y), quantizer.encode(x))


def test_gradients_are_those_of_learned_steps():
    torch.manual_seed(0)
    x = (3 * torch.randn(40)).requires_grad_()
    quantizer = Quantizer(Scheme(Integer(3)))
    quantizer.set_range(torch.tensor([[-2.0]]), torch.tensor([[2.0]]))
    quantizer.learn_scale()
    weight = torch.randn(40)
    (quantizer(x) * weight).sum().backward()
    scale = quantizer.scale.item()
    expected = 0.0
    for value, w, gradient in zip(x.tolist(), weight.tolist(), x.grad.tolist(), strict=True):
        ratio = value / scale
        inside = -4 <= ratio <= 3
        expected += w * (round(ratio) - ratio if inside else (-4 if ratio < 0 else 3))
        assert gradient == pytest.approx(w if inside else 0.0)
    assert float(quantizer.scale.grad) == pytest.approx(expected / (40 * 3) ** 0.5, rel=1e-5)
    quantizer.fix_scale()
    assert not list(quantizer.parameters())


def test_ranges_are_the_best_of_their_kind():
    torch.manual_seed(0)
    x = torch.randn(3, 4000)
    x[0, 7] = 30
    scheme = Scheme(Integer(4), per="channel", range="mse")
    error = (made(x, scheme)(x) - x).square().mean(1)
    for row, got in zip(x, error, strict=True):
        scales = torch.linspace(0.02, float(row.abs().max()) / 7, 400)
        best = min(float(((row / s).round().clamp(-8, 7) * s - row).square().mean()) for s in scales)
        assert float(got) <= 1.05 * best
    others = {
        name: (made(x, Scheme(Integer(4), per="channel", range=name))(x) - x).square().mean()
        for name in RANGES
    }
    assert others["mse"] < others["minmax"]
    assert others["entropy"] < others["minmax"]
    low, high = Quantizer(Scheme(range="percentile")).find_range(torch.arange(-500.0, 501))
    assert (float(low), float(high)) == (-499, 499)


def test_dynamic_ranges_follow_the_input(x):
    quantizer = Quantizer(Scheme(Integer(8, signed=False), symmetric=False, dynamic=True))
    for factor in (1, 100):
        assert (quantizer(factor * x) - factor * x).abs().max() <= factor * (
            x.max() - x.min()
        ) / 255 / 2 * 1.001


def test_zeros_and_constants_come_back():
    for symmetric, signed in itertools.product((True, False), repeat=2):
        quantizer = Quantizer(Scheme(Integer(8, signed), symmetric=symmetric))
        for value in (0.0, 3.0):
            quantizer.calibrate(torch.full((4,), value))
            torch.testing.assert_close(quantizer(torch.full((4,), value)), torch.full((4,), value))


def test_what_is_wrong_is_said():
    with pytest.raises(ValueError, match="no range yet; call calibrate"):
        Quantizer(Scheme())(torch.ones(3))
    with pytest.raises(ValueError, match="only Integer has a zero point"):
        Scheme(Float(2, 1), symmetric=False)
    with pytest.raises(ValueError, match="range must be one of minmax"):
        Scheme(range="best")
    with pytest.raises(ValueError, match="per must be tensor, channel or"):
        Scheme(per="row")
