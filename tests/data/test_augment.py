"""Each operation against Pillow, a slow loop or a closed form."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from omniconv.data import augment
from omniconv.data.augment import Augment, AugmentConfig

CHANNELS = (1, 3, 5)
EVERYTHING = {
    "flip_horizontal": True,
    "flip_vertical": True,
    "crop": "resized",
    "rotate": 20.0,
    "color": 0.4,
    "auto": "rand",
    "mixup": 0.4,
    "cutmix": 1.0,
    "erase": 0.5,
}


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(channels: int = 3, n: int = 8, height: int = 12, width: int = 9) -> torch.Tensor:
    return torch.randint(0, 256, (n, channels, height, width), dtype=torch.uint8, generator=random(5))


def pillow(x: torch.Tensor) -> Image.Image:
    array = x.permute(1, 2, 0).numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def tensor(image: Image.Image) -> torch.Tensor:
    array = np.array(image)
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1)) / 255


@pytest.mark.parametrize("channels", CHANNELS)
def test_nothing_asked_changes_nothing(channels):
    x, y = pictures(channels), torch.arange(8)
    images, targets = Augment(AugmentConfig(), 8)(x, y, random())
    assert images.equal(x.float() / 255)
    assert targets.equal(torch.eye(8))
    floats, _ = Augment(AugmentConfig(), 8)(images, y, random())
    assert floats.equal(images)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize(
    "config",
    [{name: value} for name, value in EVERYTHING.items()]
    + [EVERYTHING, {"crop": "pad"}, {"auto": "trivial"}],
)
def test_deterministic_and_in_range(channels, config):
    x, y = pictures(channels), torch.arange(8)
    before = x.clone()
    call = Augment(AugmentConfig(**config), 8)
    first, targets = call(x, y, random(1))
    torch.manual_seed(99)  # the global generator plays no part
    again, again_targets = call(x, y, random(1))
    other, _ = call(x, y, random(2))
    assert first.equal(again)
    assert targets.equal(again_targets)
    assert not first.equal(other)
    assert x.equal(before)
    assert (first.dtype, targets.dtype, first.shape) == (torch.float32, torch.float32, x.shape)
    assert first.min() >= 0
    assert first.max() <= 1 + 1e-6
    torch.testing.assert_close(targets.sum(1), torch.ones(8))


def test_flips_are_exact_and_happen_half_of_the_time():
    x = pictures(n=200)
    images, _ = Augment(AugmentConfig(flip_horizontal=True, flip_vertical=True), 1)(
        x, torch.zeros(200), random()
    )
    seen = [0] * 4
    for old, new in zip(x / 255, images, strict=True):
        matches = [k for k, dims in enumerate(((), (2,), (1,), (1, 2))) if old.flip(dims).equal(new)]
        assert len(matches) == 1
        seen[matches[0]] += 1
    assert all(30 < count < 70 for count in seen)


def test_pad_crop_is_a_slice_of_the_reflected_image():
    x = pictures(n=100, height=16, width=10)
    images, _ = Augment(AugmentConfig(crop="pad", crop_padding=0.25), 1)(x, torch.zeros(100), random())
    found = set()
    padded = torch.nn.functional.pad(x.float() / 255, (2, 2, 4, 4), mode="reflect")
    for big, new in zip(padded, images, strict=True):
        shifts = [(r, c) for r in range(9) for c in range(5) if big[:, r : r + 16, c : c + 10].equal(new)]
        assert len(shifts) == 1
        found.add(shifts[0])
    assert {r for r, _ in found} == set(range(9))
    assert {c for _, c in found} == set(range(5))


def test_pad_crop_of_tiny_images():
    x = pictures(height=1, width=2)
    images, _ = Augment(AugmentConfig(crop="pad", crop_padding=0.9), 1)(x, torch.zeros(8), random())
    assert images.shape == x.shape


def bilinear(image: np.ndarray, x: float, y: float) -> np.ndarray:
    """Sample at (x, y) in pixels, centres at whole numbers, border repeated."""
    _, height, width = image.shape
    x, y = min(max(x, 0), width - 1), min(max(y, 0), height - 1)
    left, top = math.floor(x), math.floor(y)
    right, bottom = min(left + 1, width - 1), min(top + 1, height - 1)
    a, b = x - left, y - top
    upper = image[:, top, left] * (1 - a) + image[:, top, right] * a
    lower = image[:, bottom, left] * (1 - a) + image[:, bottom, right] * a
    return upper * (1 - b) + lower * b


@pytest.mark.parametrize("channels", CHANNELS)
def test_warp_against_a_loop(channels):
    x = pictures(channels, n=3) / 255
    matrix = torch.eye(3).repeat(3, 1, 1) + 0.2 * torch.randn(3, 3, 3, generator=random())
    actual = augment.warp(x, matrix)
    _, _, height, width = x.shape
    for n in range(3):
        image, m = x[n].double().numpy(), matrix[n].double().numpy()
        for row in range(height):
            for column in range(width):
                at = np.array([(2 * column + 1) / width - 1, (2 * row + 1) / height - 1, 1])
                u, v = (m @ at)[:2]
                expected = bilinear(image, ((u + 1) * width - 1) / 2, ((v + 1) * height - 1) / 2)
                np.testing.assert_allclose(actual[n, :, row, column].numpy(), expected, atol=1e-5)


def test_quarter_turn_and_whole_translation_are_exact_moves():
    square = pictures(n=1, height=8, width=8) / 255
    turn = augment._rotation(torch.tensor([math.pi / 2]), 8, 8)
    torch.testing.assert_close(augment.warp(square, turn), square.rot90(1, (2, 3)), rtol=0, atol=1e-5)
    x = pictures(n=1) / 255
    half = augment._matrices(torch.tensor([3]), torch.tensor([1.0]), {**augment._WIDE, "translate": 2}, 12, 9)
    moved = augment.warp(x, half)
    torch.testing.assert_close(moved[..., :-2], x[..., 2:], rtol=0, atol=1e-5)


def test_rotation_keeps_shapes_in_images_that_are_not_square():
    # A disc stays a disc, wherever the aspect ratio would bend it.
    row, column = torch.meshgrid(torch.arange(40.0), torch.arange(60.0), indexing="ij")
    disc = (((row - 19.5) ** 2 + (column - 29.5) ** 2) < 15**2).float()[None, None]
    turned = augment.warp(disc, augment._rotation(torch.tensor([0.7]), 40, 60))
    assert (turned - disc).abs().mean() < 0.015
    bent = augment.warp(disc, augment._rotation(torch.tensor([0.7]), 1, 1))
    assert (bent - disc).abs().mean() > 0.03


def test_shear_moves_each_row_by_its_height():
    x = pictures(n=1, height=9, width=9) / 255
    matrix = augment._matrices(torch.tensor([1]), torch.tensor([1.0]), {**augment._WIDE, "shear": 1}, 9, 9)
    sheared = augment.warp(x, matrix)
    for row in range(9):
        shift = row - 4
        columns = (torch.arange(9) + shift).clamp(0, 8)
        torch.testing.assert_close(sheared[0, :, row], x[0, :, row, columns], rtol=0, atol=1e-5)


def test_crops_have_the_asked_area_and_stay_inside():
    matrix = augment.random_crop_matrix(5000, 0.25, random())
    width, height = matrix[:, 0, 0], matrix[:, 1, 1]
    area = width * height
    assert area.min() >= 0.24
    assert area.max() <= 1
    ratio = width / height
    assert ratio.min() >= 3 / 4 - 1e-4
    assert ratio.max() <= 4 / 3 + 1e-4
    assert (matrix[:, 0, 2].abs() <= 1 - width + 1e-6).all()
    assert (matrix[:, 1, 2].abs() <= 1 - height + 1e-6).all()
    torch.testing.assert_close(area.mean().item(), 0.61, rtol=0, atol=0.03)


FACTORS = torch.tensor([0.0, 0.3, 1.0, 1.7])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (augment.brightness, ImageEnhance.Brightness),
        (augment.contrast, ImageEnhance.Contrast),
        (augment.saturation, ImageEnhance.Color),
        (augment.sharpness, ImageEnhance.Sharpness),
    ],
)
def test_enhancements_are_pillows(channels, ours, theirs):
    x = pictures(channels, n=4)
    actual = ours(x / 255, FACTORS)
    for n, factor in enumerate(FACTORS.tolist()):
        expected = tensor(theirs(pillow(x[n])).enhance(factor))
        # Pillow rounds the image it blends with, and its result, to whole values.
        torch.testing.assert_close(actual[n], expected, rtol=0, atol=2 / 255)


@pytest.mark.parametrize("channels", [1, 3])
def test_histogram_operations_are_pillows(channels):
    x = pictures(channels, n=4, height=40, width=30)
    x[0] = x[0] // 3 + 40
    x[1] = 77  # constant
    x[2, :, :20] = 3
    unit = x / 255
    for n in range(4):
        expected = tensor(ImageOps.equalize(pillow(x[n])))
        torch.testing.assert_close(augment.equalize(unit)[n], expected, rtol=0, atol=1e-6)
        expected = tensor(ImageOps.autocontrast(pillow(x[n])))
        torch.testing.assert_close(augment.autocontrast(unit)[n], expected, rtol=0, atol=1.01 / 255)
        for bits in (1, 4, 8):
            expected = tensor(ImageOps.posterize(pillow(x[n]), bits))
            actual = augment.posterize(unit, torch.full((4,), float(bits)))[n]
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
        for threshold in (0, 100, 255):
            expected = tensor(ImageOps.solarize(pillow(x[n]), threshold))
            actual = augment.solarize(unit, torch.full((4,), threshold / 255))[n]
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_saturation_of_many_channels():
    x = pictures(5, n=2) / 255
    grey = augment.saturation(x, torch.zeros(2))
    torch.testing.assert_close(grey, x.mean(1, keepdim=True).expand_as(x))


@pytest.mark.parametrize("name", augment._OPS)
@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_every_automatic_operation_acts_on_its_sample_alone(name, level, monkeypatch):
    x = pictures(n=6, height=30, width=40) / 255
    number = augment._OPS.index(name)
    choice = torch.tensor([number, 0, number, 0, 0, number])
    with monkeypatch.context() as patch:
        patch.setattr(augment.torch, "randint", lambda *_, **__: choice)
        out = augment._apply(x, augment._WIDE, torch.full((6,), level), random())
    untouched = torch.tensor([1, 3, 4])
    assert out[untouched].equal(x[untouched])
    if level == 0 and name not in ("autocontrast", "equalize"):
        torch.testing.assert_close(out, x, rtol=0, atol=1e-5)
    if level == 1 and name not in ("identity", "autocontrast"):
        assert not out[choice == number].equal(x[choice == number])


@pytest.mark.parametrize("function", [augment.trivial_augment, augment.rand_augment])
def test_automatic_operations_are_drawn_evenly(function):
    # A picture on which every operation but the identity shows, once or more.
    x = (pictures(n=1).repeat(2800, 1, 1, 1) / 255) * 0.8
    changed = (function(x, random()) != x).flatten(1).any(1).float().mean().item()
    rounds = 2 if function is augment.rand_augment else 1
    # 13 of 14 operations act; of trivial's 31 levels the lowest do nothing for some.
    assert 1 - (1 / 14) ** rounds - 0.12 <= changed <= 1 - (1 / 14) ** rounds + 0.02


def test_mixup_is_the_blend_that_the_targets_say():
    x, y = pictures(n=16), torch.arange(16)
    images, targets = Augment(AugmentConfig(mixup=0.8), 16)(x, y, random())
    mixed = torch.einsum("nk,kchw->nchw", targets, x / 255)
    torch.testing.assert_close(images, mixed)
    assert ((targets > 0).sum(1) == 2).sum() > 8


def test_cutmix_shares_are_pixel_shares():
    n = 12
    x = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 3, 10, 13).contiguous()
    images, targets = Augment(AugmentConfig(cutmix=1.0), n)(x, torch.arange(n), random())
    for image, target in zip(images, targets, strict=True):
        values, counts = (image[0] * 255).round().long().unique(return_counts=True)
        expected = torch.zeros(n).index_put((values,), counts / 130.0)
        torch.testing.assert_close(target, expected)
        for value in values[counts < 65]:  # the smaller part, or what it leaves, is a rectangle
            rows, columns = ((image[0] * 255).round() == value).nonzero(as_tuple=True)
            box = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
            assert box in (len(rows), 130)


def test_mixing_takes_one_of_two_a_batch_and_needs_two_images():
    config = AugmentConfig(mixup=1.0, cutmix=1.0)
    x = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 1, 8, 8).contiguous() * 40
    cut = 0
    for seed in range(60):
        images, _ = Augment(config, 6)(x, torch.arange(6), random(seed))
        values = set((images * 255).round().unique().tolist())
        cut += values <= {0, 40, 80, 120, 160, 200}
    assert 15 < cut < 45
    images, targets = Augment(config, 6)(x[:1], torch.arange(1), random())
    assert images.equal(x[:1] / 255)
    assert targets.equal(torch.eye(6)[:1])


def test_other_tasks():
    x = pictures(n=4)
    values = torch.tensor([[1.5, -2.0], [0.0, 4.0], [3.0, 3.0], [9.0, 1.0]])
    _, same = Augment(AugmentConfig(), 2, "regression")(x, values, random())
    assert same.equal(values)
    _, several = Augment(AugmentConfig(cutmix=1.0), 2, "multilabel")(x, values.clamp(0, 1).round(), random())
    assert several.shape == (4, 2)
    with pytest.raises(ValueError, match="cutmix mixes labels by area and cannot serve a regression"):
        Augment(AugmentConfig(cutmix=1.0), 2, "regression")


def test_erasing():
    x = torch.full((400, 2, 20, 20), 2.0)  # outside of the range of noise
    out = augment.random_erase(x, 0.5, random())
    erased = out != 2
    assert erased[:, 0].equal(erased[:, 1])
    share = erased[:, 0].float().mean((1, 2))
    assert 0.4 < (share > 0).float().mean() < 0.6
    assert share.max() <= 1 / 3 + 0.05
    for mask in erased[:, 0][:50]:
        rows, columns = mask.nonzero(as_tuple=True)
        if len(rows):
            assert mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()
    assert augment.random_erase(x, 0.0, random()).equal(x)


def test_no_double_precision(monkeypatch):
    real = torch.Tensor.double
    monkeypatch.setattr(torch.Tensor, "double", lambda self: pytest.fail("double precision") or real(self))
    x, y = pictures(), torch.arange(8)
    for auto in ("trivial", "rand"):
        images, targets = Augment(AugmentConfig(**{**EVERYTHING, "auto": auto}), 8)(x, y, random())
        assert {images.dtype, targets.dtype} == {torch.float32}
