"""Pictures for people: raw tensors and activation maps as PNG, tiny ones enlarged without blur."""

import io
import math

import numpy as np
import torch
from torch import Tensor

__all__ = ["heat", "overlay_png", "to_png", "to_rgb"]

# Inferno's course from black over violet and orange to yellow, at nine equal steps; between them, linear.
# (https://bids.github.io/colormap, public domain). Perceptually even, and readable without colour vision.
_INFERNO = np.array(
    [
        (0, 0, 4), (31, 12, 72), (85, 15, 109), (136, 34, 106), (186, 54, 85),
        (227, 89, 51), (249, 140, 10), (249, 201, 50), (252, 255, 164),
    ]
)  # fmt: skip


def to_rgb(image: Tensor, low: float, high: float) -> np.ndarray:
    """Return an image as 8-bit RGB.

    Args:
        image: (C, H, W) raw pixel values. Three channels are red, green and blue; of more, the first three
            are shown; of one or two, the first is shown in grey.
        low: the value shown black.
        high: the value shown white.

    Shapes:
        - output: (H, W, 3), uint8
    """
    if image.ndim != 3:
        raise ValueError(f"image must be (C, H, W): got shape {tuple(image.shape)}")
    channels = image[:3] if image.shape[0] >= 3 else image[:1].expand(3, -1, -1)
    scaled = (channels.detach().cpu().double() - low) / (high - low if high > low else 1)
    scaled = torch.nan_to_num(scaled, nan=0.0).clamp(0, 1)
    return (scaled * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()


def heat(values: np.ndarray) -> np.ndarray:
    """Return the colour, float RGB from 0 to 255, of every value in [0, 1]."""
    position = np.clip(np.nan_to_num(values), 0, 1) * (len(_INFERNO) - 1)
    below = np.minimum(position.astype(int), len(_INFERNO) - 2)
    share = (position - below)[..., None]
    return (1 - share) * _INFERNO[below] + share * _INFERNO[below + 1]


def _display_size(rgb: np.ndarray, min_side: int, max_side: int) -> tuple[int, int]:
    height, width, _ = rgb.shape
    # A whole factor, so that every pixel of a tiny image becomes an equal square; long strips stay in bounds.
    factor = min(math.ceil(min_side / min(height, width)), max_side // max(height, width))
    if factor >= 1:
        return height * factor, width * factor
    shrink = max_side / max(height, width)
    return max(1, round(height * shrink)), max(1, round(width * shrink))


def _resized(rgb: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    from PIL import Image

    how = Image.Resampling.NEAREST if size[0] >= rgb.shape[0] else Image.Resampling.BOX
    return np.asarray(Image.fromarray(rgb).resize((size[1], size[0]), how))


def _png(rgb: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def to_png(image: Tensor, low: float, high: float, min_side: int = 96, max_side: int = 320) -> bytes:
    """Return an image as the bytes of a PNG file of a size for display.

    Args:
        image: (C, H, W) raw pixel values; see `to_rgb`.
        low: the value shown black.
        high: the value shown white.
        min_side: a smaller image is enlarged by a whole factor until its shorter side has so many pixels.
        max_side: a larger one is reduced until its longer side has no more than so many.
    """
    rgb = to_rgb(image, low, high)
    return _png(_resized(rgb, _display_size(rgb, min_side, max_side)))


def overlay_png(
    image: Tensor,
    activation: Tensor | np.ndarray,
    low: float,
    high: float,
    min_side: int = 96,
    max_side: int = 320,
) -> bytes:
    """Return an image in grey with an activation map over it in colour, as the bytes of a PNG file.

    Where the map is 0 the picture shows through; where it is 1 the colour covers most of it.

    Args:
        image: (C, H, W) raw pixel values; see `to_rgb`.
        activation: (h, w), values in [0, 1], of any size; it is enlarged smoothly.
        low: the value shown black.
        high: the value shown white.
        min_side: as in `to_png`.
        max_side: as in `to_png`.
    """
    from PIL import Image

    rgb = to_rgb(image, low, high)
    size = _display_size(rgb, min_side, max_side)
    grey = _resized(rgb, size).astype(float) @ np.array([0.299, 0.587, 0.114])
    values = np.asarray(activation, dtype=np.float32)
    if values.ndim != 2:
        raise ValueError(f"activation must be (h, w): got shape {values.shape}")
    smooth = Image.fromarray(values).resize((size[1], size[0]), Image.Resampling.BILINEAR)
    weight = np.clip(np.nan_to_num(np.asarray(smooth)), 0, 1)
    cover = (0.8 * weight**0.75)[..., None]
    mixed = (1 - cover) * (0.75 * grey + 24)[..., None] + cover * heat(0.25 + 0.75 * weight)
    return _png(np.clip(mixed.round(), 0, 255).astype(np.uint8))
