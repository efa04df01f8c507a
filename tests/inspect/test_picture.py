import io

import numpy as np
import pytest
import torch
from PIL import Image

from omniconv.inspect.picture import heat, overlay_png, to_png, to_rgb


def decode(content):
    image = Image.open(io.BytesIO(content))
    assert image.format == "PNG"
    return np.asarray(image)


@pytest.mark.parametrize(("size", "factor"), [(8, 12), (28, 4), (95, 2)])
def test_tiny_pictures_become_equal_squares_of_whole_pixels(size, factor):
    image = torch.randint(0, 256, (1, size, size), dtype=torch.uint8)
    shown = decode(to_png(image, 0, 255))
    expected = image[0].numpy().repeat(factor, 0).repeat(factor, 1)
    np.testing.assert_array_equal(shown, np.repeat(expected[..., None], 3, 2))


def test_large_pictures_shrink_and_keep_their_shape():
    shown = decode(to_png(torch.zeros(3, 1000, 500), 0, 1, max_side=320))
    assert shown.shape == (320, 160, 3)


def test_a_long_strip_stays_in_bounds():
    assert decode(to_png(torch.zeros(1, 2, 900), 0, 1)).shape == (1, 320, 3)
    assert decode(to_png(torch.zeros(1, 2, 100), 0, 1)).shape == (6, 300, 3)


def test_sixteen_bit_float_and_many_channels():
    image = torch.tensor([0.0, 32767.5, 65535.0, 70000.0, float("nan")]).expand(5, 1, 5)
    np.testing.assert_array_equal(to_rgb(image, 0, 65535)[0, :, 0], [0, 128, 255, 255, 0])
    bands = torch.stack([torch.full((2, 2), float(band)) for band in range(6)])
    np.testing.assert_array_equal(to_rgb(bands, 0, 2)[0, 0], [0, 128, 255])
    assert (to_rgb(torch.ones(2, 3, 3), 1, 1) == 0).all()  # a range of nothing shows black, without an error


def test_colours_rise_in_brightness():
    luminance = heat(np.linspace(0, 1, 50)) @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(luminance) > 0).all()


def test_overlay_shows_the_picture_where_the_map_is_zero_and_colour_where_it_is_one():
    image = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    activation = torch.zeros(8, 8)
    activation[2, 3] = 1
    shown = decode(overlay_png(image, activation, 0, 255)).astype(int)
    assert shown.shape == (96, 96, 3)
    np.testing.assert_array_equal(shown[80:, 80:].max(2), shown[80:, 80:].min(2))  # grey
    hot = shown[30, 42]
    assert hot[0] > 150
    assert hot[0] - hot[2] > 50


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"image must be \(C, H, W\): got shape \(4, 4\)"):
        to_png(torch.zeros(4, 4), 0, 1)
    with pytest.raises(ValueError, match=r"activation must be \(h, w\): got shape \(1, 4, 4\)"):
        overlay_png(torch.zeros(1, 4, 4), np.zeros((1, 4, 4)), 0, 1)
