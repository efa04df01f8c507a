"""Drawn scenes for checks of segmentation: shapes of three kinds and of uncertain colour before a noisy ground."""

import torch
from torch import Tensor, nn

from omniconv.core.seeds import derive, generator
from omniconv.models.dense.segmenter import Segmenter
from omniconv.models.factory import create_model

__all__ = ["CLASSES", "SIZE", "make_segmenter", "mean_iou", "scenes"]

CLASSES = 4
"""Ground, disk, square, triangle."""
SIZE = 48
_COLOURS = torch.tensor([[0.0, 0.0, 0.0], [0.9, 0.2, 0.2], [0.2, 0.9, 0.2], [0.2, 0.2, 0.9]])


def scenes(count: int, *names: str | int) -> tuple[Tensor, Tensor, Tensor]:
    """Return images (N, 3, 48, 48), masks (N, 48, 48) and the number of objects of each, 1 to 6.

    Args:
        count: N.
        *names: of the set; the same names give the same scenes.
    """
    random = generator(0, "scenes", *names)
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    images = torch.zeros(count, 3, SIZE, SIZE)
    masks = torch.zeros(count, SIZE, SIZE, dtype=torch.long)
    objects = torch.randint(1, 7, (count,), generator=random)
    for n in range(count):
        for _ in range(int(objects[n])):
            kind = int(torch.randint(1, CLASSES, (), generator=random))
            radius = float(torch.empty(()).uniform_(5, 9, generator=random))
            y, x = torch.empty(2).uniform_(4, SIZE - 4, generator=random).tolist()
            dy, dx = rows - y, columns - x
            inside = {
                1: dy**2 + dx**2 <= radius**2,
                2: torch.maximum(dy.abs(), dx.abs()) <= 0.85 * radius,
                3: (dy <= 0.8 * radius) & (dy >= 2 * dx.abs() - 1.2 * radius),
            }[kind]
            colour = _COLOURS[kind] + 0.25 * torch.randn(3, generator=random)
            images[n, :, inside] = colour[:, None]
            masks[n, inside] = kind
    return images + 0.5 * torch.randn(images.shape, generator=random), masks, objects


def make_segmenter(seed: int) -> Segmenter:
    """Return a new vision transformer of 144 tokens, six blocks and 0.2 million parameters that segments scenes."""
    torch.manual_seed(derive(seed, "weights"))
    encoder = create_model(
        "vit_test", num_classes=0, dim=48, depth=6, num_heads=3, patch_size=4, img_size=SIZE, layer_scale=None,
        drop_path_rate=0.0,
    )  # fmt: skip
    return Segmenter(encoder, CLASSES)  # pyright: ignore[reportArgumentType]


@torch.no_grad()
def mean_iou(model: nn.Module, images: Tensor, masks: Tensor, batch: int = 50) -> float:
    """Return the mean intersection over union of the classes over all pixels, in percent, in eval mode."""
    model.eval()
    found = torch.cat([model(x).argmax(1) for x in images.split(batch)])
    scores = [
        float(((found == c) & (masks == c)).sum()) / max(1.0, float(((found == c) | (masks == c)).sum()))
        for c in range(CLASSES)
    ]
    return 100 * sum(scores) / CLASSES
