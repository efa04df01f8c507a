"""Augmentation of whole batches with tensor operations: each sample has its own draw, all from one generator.

Mixup: https://arxiv.org/abs/1710.09412. CutMix: https://arxiv.org/abs/1905.04899. Random erasing:
https://arxiv.org/abs/1708.04896. RandAugment: https://arxiv.org/abs/1909.13719. TrivialAugment:
https://arxiv.org/abs/2103.10158.
"""

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Generator, Tensor
from torch.nn import functional as F

from omniconv.core.config import Config

__all__ = ["Augment", "AugmentConfig"]


class AugmentConfig(Config):
    """What is done to training images; the defaults do nothing.

    Attributes:
        flip_horizontal: mirror left and right, half of the time.
        flip_vertical: mirror top and bottom, half of the time.
        crop: "pad" moves the image by whole pixels and fills by reflection; "resized" cuts a random part and
            stretches it to the full size.
        crop_padding: largest movement of "pad", as a share of the side.
        crop_scale: smallest share of the area that "resized" cuts.
        rotate: largest rotation in degrees, to either side.
        color: strength of random brightness, contrast and saturation: factors from 1 - color to 1 + color.
        auto: "trivial" applies one operation of TrivialAugment, "rand" two of RandAugment (level 9 of 30).
        mixup: alpha of the Beta distribution with which pairs of images are blended; 0 for none.
        cutmix: alpha of the Beta distribution of the area that is taken from another image; 0 for none. With
            mixup, too, each batch takes one of the two.
        erase: probability with which a rectangle is replaced by noise.
    """

    flip_horizontal: bool = False
    flip_vertical: bool = False
    crop: Literal["none", "pad", "resized"] = "none"
    crop_padding: float = Field(default=0.125, ge=0, lt=1)
    crop_scale: float = Field(default=0.35, gt=0, le=1)
    rotate: float = Field(default=0.0, ge=0, le=180)
    color: float = Field(default=0.0, ge=0, le=1)
    auto: Literal["none", "trivial", "rand"] = "none"
    mixup: float = Field(default=0.0, ge=0)
    cutmix: float = Field(default=0.0, ge=0)
    erase: float = Field(default=0.0, ge=0, le=1)


class Augment:
    """Draws a new version of every image of a batch, and the targets that belong to it.

    Args:
        config: what to do.
        classes: number of classes or target values K.
        task: "classification" (targets become one-hot), "multilabel" or "regression".

    Raises:
        ValueError: if cutmix is asked for a regression, where a part of an image has no part of the value.
    """

    def __init__(self, config: AugmentConfig, classes: int, task: str = "classification") -> None:
        if task == "regression" and config.cutmix:
            raise ValueError("cutmix mixes labels by area and cannot serve a regression; set cutmix to 0")
        self.config, self.classes, self.task = config, classes, task

    def __call__(self, images: Tensor, targets: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Return augmented images (N, C, H, W), float32 from 0 to 1, and float targets (N, K).

        Args:
            images: (N, C, H, W), uint8, or float already scaled to 0..1; not changed.
            targets: (N,) class indices, or (N, K) values.
            generator: source of all randomness, on the CPU.
        """
        config = self.config
        x = self._move(images, generator)
        if config.auto == "trivial":
            x = trivial_augment(x, generator)
        elif config.auto == "rand":
            x = rand_augment(x, generator)
        if config.color:
            x = color_jitter(x, config.color, generator)
        if config.erase:
            x = random_erase(x, config.erase, generator)
        if self.task == "classification":
            targets = F.one_hot(targets.long(), self.classes)
        return self._mix(x, targets.float(), generator)

    def _move(self, images: Tensor, generator: Generator) -> Tensor:
        """Crop, flip and rotate; without interpolation where that is possible."""
        config, n = self.config, len(images)
        flip_x = _coin(n, generator) if config.flip_horizontal else None
        flip_y = _coin(n, generator) if config.flip_vertical else None
        shift = 0.0
        if config.crop == "pad":
            shift = config.crop_padding
        if shift or flip_x is not None or flip_y is not None:
            images = shift_and_flip(images, shift, flip_x, flip_y, generator)
        x = _unit(images)
        if config.crop != "resized" and not config.rotate:
            return x
        matrix = torch.eye(3).repeat(n, 1, 1)
        if config.crop == "resized":
            matrix = random_crop_matrix(n, config.crop_scale, generator)
        if config.rotate:
            angle = _uniform(n, -config.rotate, config.rotate, generator) * (math.pi / 180)
            matrix = matrix @ _rotation(angle, x.shape[2], x.shape[3])
        return warp(x, matrix)

    def _mix(self, x: Tensor, targets: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        config = self.config
        if not (config.mixup or config.cutmix) or len(x) < 2:
            return x, targets
        cut = bool(config.cutmix)
        if config.mixup and config.cutmix:
            cut = bool(_coin(1, generator))
        partner = torch.randperm(len(x), generator=generator).to(x.device)
        share = _beta(config.cutmix if cut else config.mixup, len(x), generator).to(x.device)
        if cut:
            box = random_boxes(x.shape[2], x.shape[3], (1 - share.cpu()).sqrt(), generator).to(x.device)
            share = 1 - box.float().mean((1, 2))
            x = torch.where(box[:, None], x[partner], x)
        else:
            x = torch.lerp(x[partner], x, share.view(-1, 1, 1, 1))
        return x, torch.lerp(targets[partner.to(targets.device)], targets, share[:, None].to(targets.device))


def _unit(images: Tensor) -> Tensor:
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def _coin(n: int, generator: Generator) -> Tensor:
    return torch.rand(n, generator=generator) < 0.5


def _uniform(n: int, low: float, high: float, generator: Generator) -> Tensor:
    return torch.rand(n, generator=generator) * (high - low) + low


def _beta(alpha: float, n: int, generator: Generator) -> Tensor:
    # torch draws no Beta numbers from a given generator.
    seed = int(torch.randint(2**62, (1,), generator=generator))
    return torch.from_numpy(np.random.default_rng(seed).beta(alpha, alpha, n).astype(np.float32))


# Geometry


def shift_and_flip(
    images: Tensor, padding: float, flip_x: Tensor | None, flip_y: Tensor | None, generator: Generator
) -> Tensor:
    """Return images moved by whole pixels, up to `padding` of their sides, and mirrored; reflected at borders.

    Every output pixel is one input pixel: nothing is interpolated.
    """
    n, _, height, width = images.shape
    rows = _source_lines(n, height, padding, flip_y, generator).to(images.device)
    columns = _source_lines(n, width, padding, flip_x, generator).to(images.device)
    moved = images.permute(0, 2, 3, 1)  # whole pixels are gathered at once
    sample = torch.arange(n, device=images.device).view(-1, 1, 1)
    return moved[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def _source_lines(n: int, length: int, padding: float, flip: Tensor | None, generator: Generator) -> Tensor:
    """Return for every sample which input line each output line shows, (n, length)."""
    most = min(round(padding * length), length - 1)
    lines = torch.arange(length).repeat(n, 1)
    if padding:
        lines = lines + torch.randint(-most, most + 1, (n, 1), generator=generator)
        lines = (length - 1) - ((length - 1) - lines.abs()).abs()
    return lines if flip is None else torch.where(flip[:, None], lines.flip(1), lines)


def warp(x: Tensor, matrix: Tensor) -> Tensor:
    """Return images sampled bilinearly at `matrix` @ (x, y, 1), beyond the border as at the border.

    Args:
        x: float images (N, C, H, W).
        matrix: (N, 3, 3), from output to input coordinates, both from -1 to 1 over the image.
    """
    grid = F.affine_grid(matrix[:, :2].to(x), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def random_crop_matrix(n: int, scale: float, generator: Generator) -> Tensor:
    """Return matrices (n, 3, 3) of crops of `scale` to 1 of the area, 3/4 to 4/3 as wide as high."""
    area = _uniform(n, scale, 1.0, generator)
    ratio = _uniform(n, math.log(3 / 4), math.log(4 / 3), generator).exp()
    width = (area * ratio).sqrt().clamp(max=1)
    height = (area / ratio).sqrt().clamp(max=1)
    matrix = torch.zeros(n, 3, 3)
    matrix[:, 0, 0], matrix[:, 1, 1], matrix[:, 2, 2] = width, height, 1
    matrix[:, 0, 2] = (1 - width) * _uniform(n, -1, 1, generator)
    matrix[:, 1, 2] = (1 - height) * _uniform(n, -1, 1, generator)
    return matrix


def _rotation(angle: Tensor, height: int, width: int) -> Tensor:
    """Return matrices that turn by `angle` (radians) in pixels, whatever the aspect ratio."""
    matrix = torch.zeros(len(angle), 3, 3)
    matrix[:, 0, 0] = matrix[:, 1, 1] = angle.cos()
    matrix[:, 0, 1] = -angle.sin() * (height / width)
    matrix[:, 1, 0] = angle.sin() * (width / height)
    matrix[:, 2, 2] = 1
    return matrix


# Colour


def _grey(x: Tensor) -> Tensor:
    """Return (N, 1, H, W): ITU-R 601 luma of three channels, the mean of any other number."""
    if x.shape[1] == 3:
        weights = torch.tensor([0.299, 0.587, 0.114], device=x.device, dtype=x.dtype)
        return (x * weights.view(-1, 1, 1)).sum(1, keepdim=True)
    return x.mean(1, keepdim=True)


def _blend(x: Tensor, other: Tensor | float, factor: Tensor) -> Tensor:
    """Return other + factor (x - other), within 0..1; a factor of 1 gives x."""
    factor = factor.to(x).view(-1, 1, 1, 1)
    return (x * factor + other * (1 - factor)).clamp(0, 1)


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply all values by a factor a sample."""
    return _blend(x, 0.0, factor)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply the distance from the image's mean grey by a factor a sample."""
    return _blend(x, _grey(x).mean((2, 3), keepdim=True), factor)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply the distance from each pixel's grey by a factor a sample; one channel stays as it is."""
    return x if x.shape[1] == 1 else _blend(x, _grey(x), factor)


def sharpness(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply the distance from a smoothed image by a factor a sample; border pixels stay as they are."""
    if min(x.shape[2:]) < 3:
        return x
    kernel = torch.ones(3, 3, device=x.device, dtype=x.dtype)
    kernel[1, 1] = 5
    kernel = (kernel / 13).repeat(x.shape[1], 1, 1, 1)
    smooth = x.clone()
    smooth[:, :, 1:-1, 1:-1] = F.conv2d(x, kernel, groups=x.shape[1])
    return _blend(x, smooth, factor)


def posterize(x: Tensor, bits: Tensor) -> Tensor:
    """Keep the upper `bits` of eight bits, a number a sample."""
    step = (2 ** (8 - bits)).to(x.device).int().view(-1, 1, 1, 1)
    return ((x * 255).round().int() // step * step).float() / 255


def solarize(x: Tensor, threshold: Tensor) -> Tensor:
    """Invert all values at or above a threshold a sample."""
    return torch.where(x >= threshold.to(x).view(-1, 1, 1, 1), 1 - x, x)


def autocontrast(x: Tensor) -> Tensor:
    """Stretch every channel of every image to 0..1; a constant channel stays as it is."""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(high > low, (x - low) / (high - low).clamp(min=1e-12), x)


def equalize(x: Tensor) -> Tensor:
    """Flatten the histogram (256 bins) of every channel of every image, by the rule of Pillow."""
    n, channels, height, width = x.shape
    levels = (x * 255).round().long().view(n * channels, -1)
    counts = torch.zeros(n * channels, 256, dtype=torch.long, device=x.device)
    counts.scatter_add_(1, levels, torch.ones_like(levels))
    last = counts.gather(1, levels.amax(1, keepdim=True))
    step = (height * width - last) // 255
    below = counts.cumsum(1) - counts
    table = torch.where(
        step > 0, (below + step // 2) // step.clamp(min=1), torch.arange(256, device=x.device)
    )
    flat = table.clamp(max=255).gather(1, levels).float() / 255
    return torch.where((step > 0).view(n, channels, 1, 1), flat.view_as(x), x)


def color_jitter(x: Tensor, strength: float, generator: Generator) -> Tensor:
    """Change brightness, contrast and saturation by factors from 1 - strength to 1 + strength."""
    for change in (brightness, contrast, saturation):
        x = change(x, _uniform(len(x), 1 - strength, 1 + strength, generator))
    return x


# Automatic augmentation. A level lies in [0, 1]; the sign of a change is drawn apart.

_OPS = (
    "identity shear_x shear_y translate_x translate_y rotate "
    "brightness saturation contrast sharpness posterize solarize autocontrast equalize"
).split()
_GEOMETRIC = 6  # operations before this one are matrices
_Ranges = dict[str, float]
_WIDE: _Ranges = {"shear": 0.99, "translate": 32, "rotate": 135, "enhance": 0.99, "bits": 6}
_RAND: _Ranges = {"shear": 0.3, "translate": math.inf, "rotate": 30, "enhance": 0.9, "bits": 4}
_MOST_TRANSLATION = 150 / 331  # of a side; no operation moves the image out of sight


def trivial_augment(x: Tensor, generator: Generator) -> Tensor:
    """Apply one random operation of the wide set of TrivialAugment at a random level to every image."""
    level = torch.randint(31, (len(x),), generator=generator) / 30
    return _apply(x, _WIDE, level, generator)


def rand_augment(x: Tensor, generator: Generator, operations: int = 2, magnitude: int = 9) -> Tensor:
    """Apply `operations` random operations of RandAugment at `magnitude` of 30 to every image."""
    for _ in range(operations):
        x = _apply(x, _RAND, torch.full((len(x),), magnitude / 30), generator)
    return x


def _apply(x: Tensor, ranges: _Ranges, level: Tensor, generator: Generator) -> Tensor:
    which = torch.randint(len(_OPS), (len(x),), generator=generator)
    sign = _coin(len(x), generator).float() * 2 - 1
    out = x.clone()
    moved = ((which > 0) & (which < _GEOMETRIC)).nonzero().flatten()
    if len(moved):
        height, width = x.shape[2:]
        matrices = _matrices(which[moved], (level * sign)[moved], ranges, height, width)
        out[moved.to(x.device)] = warp(x[moved.to(x.device)], matrices)
    for number in range(_GEOMETRIC, len(_OPS)):
        chosen = (which == number).nonzero().flatten()
        if len(chosen):
            place = chosen.to(x.device)
            out[place] = _change(_OPS[number], x[place], level[chosen], sign[chosen], ranges)
    return out


def _matrices(which: Tensor, amount: Tensor, ranges: _Ranges, height: int, width: int) -> Tensor:
    """Return the matrices of geometric operations; `amount` is the signed level."""
    matrix = _rotation(torch.where(which == 5, amount * math.radians(ranges["rotate"]), 0.0), height, width)
    matrix[:, 0, 1] += torch.where(which == 1, amount * ranges["shear"] * (height / width), 0.0)
    matrix[:, 1, 0] += torch.where(which == 2, amount * ranges["shear"] * (width / height), 0.0)
    for row, length in enumerate((width, height)):
        most = min(ranges["translate"], _MOST_TRANSLATION * length)
        matrix[:, row, 2] += torch.where(which == 3 + row, amount * most * (2 / length), 0.0)
    return matrix


def _change(op: str, x: Tensor, level: Tensor, sign: Tensor, ranges: _Ranges) -> Tensor:
    if op == "posterize":
        return posterize(x, 8 - (level * ranges["bits"]).round())
    if op == "solarize":
        # Level 0 leaves everything: no value is above 1, and white itself is left alone there.
        return torch.where((level == 0).to(x.device).view(-1, 1, 1, 1), x, solarize(x, 1 - level))
    if op == "autocontrast":
        return autocontrast(x)
    if op == "equalize":
        return equalize(x)
    return _ENHANCE[op](x, 1 + sign * level * ranges["enhance"])


_ENHANCE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "brightness": brightness,
    "saturation": saturation,
    "contrast": contrast,
    "sharpness": sharpness,
}


# Boxes


def random_boxes(
    height: int, width: int, side: Tensor, generator: Generator, ratio: Tensor | None = None
) -> Tensor:
    """Return boolean masks (N, H, W) of rectangles with random centres, cut off at the border.

    Args:
        height: H.
        width: W.
        side: (N,) side of each rectangle as a share of the image's sides.
        generator: source of randomness.
        ratio: (N,) height over width of each rectangle, relative to the image's; 1 by default.
    """
    ratio = torch.ones_like(side) if ratio is None else ratio
    masks = []
    for length, share in ((height, side * ratio.sqrt()), (width, side / ratio.sqrt())):
        extent = (share * length).round().clamp(max=length)
        start = ((torch.rand(len(side), generator=generator) * length).floor() - (extent / 2).floor())[
            :, None
        ]
        line = torch.arange(length)
        masks.append((line >= start) & (line < start + extent[:, None]))
    return masks[0][:, :, None] & masks[1][:, None, :]


def random_erase(x: Tensor, probability: float, generator: Generator) -> Tensor:
    """Replace a rectangle of 2% to 33% of the area by uniform noise, with `probability`, in every image."""
    n, channels, height, width = x.shape
    chosen = torch.rand(n, generator=generator) < probability
    side = _uniform(n, 0.02, 1 / 3, generator).sqrt()
    ratio = _uniform(n, math.log(0.3), math.log(1 / 0.3), generator).exp()
    box = random_boxes(height, width, side, generator, ratio) & chosen.view(-1, 1, 1)
    noise = torch.rand((n, channels, height, width), generator=generator).to(x.device)
    return torch.where(box.to(x.device)[:, None], noise, x)
