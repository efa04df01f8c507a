"""Invariance of predictions: for how many images does the answer stay when the image is moved, turned or scaled?

Paper: Hu et al., Demystify Transformers & Convolutions in Modern Image Deep Networks,
https://arxiv.org/abs/2211.05781. What a transform brings in from beyond the border is the image mirrored there, where
the paper has larger images to cut from, or zeros.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.config import closest
from omniconv.inspect.artifact import Artifact
from omniconv.inspect.modes import evaluating

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Change", "Invariance", "invariance", "transform_images"]

Change = Literal["translation", "rotation", "scale"]


class Invariance(Artifact):
    """`data["agreement"]` is the share of unchanged answers at every one of `data["levels"]`, both (L,)."""

    title = "Invariance of predictions"

    @property
    def mean(self) -> float:
        """The share of unchanged answers, averaged over the levels."""
        return float(self.data["agreement"].mean())

    def plot(self) -> "Figure":
        """Draw the share over the levels."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5, 3.5), layout="constrained")
        axis = figure.subplots()
        axis.plot(self.data["levels"], self.data["agreement"], marker="o")
        axis.set(xlabel=str(self.data["change"]), ylabel="unchanged answers", ylim=(0, 1.02))
        return figure


def _require_known(change: str) -> None:
    known = list(get_args(Change))
    if change not in known:
        raise ValueError(f"change must be one of {known}: got {change!r}{closest(change, known)}")


def transform_images(x: Tensor, change: Change, level: float, angle: float = 0.0) -> Tensor:
    """Return images (N, C, H, W) moved `level` pixels, turned clockwise `level` degrees or enlarged `level` times.

    Args:
        x: the images.
        change: which of these.
        level: how much of it.
        angle: of the direction of a translation, in degrees from right to down.
    """
    _require_known(change)
    height, width = x.shape[2:]
    turn, zoom, right, down = 0.0, 1.0, 0.0, 0.0
    if change == "rotation":
        turn = math.radians(level)
    elif change == "scale":
        zoom = level
    else:
        right, down = (level * f(math.radians(angle)) for f in (math.cos, math.sin))
    cos, sin = math.cos(turn) / zoom, math.sin(turn) / zoom
    # From places in the result to places in the image, in halves of their sides.
    matrix = torch.tensor(
        [[cos, sin * height / width, -2 * right / width], [-sin * width / height, cos, -2 * down / height]],
        device=x.device,
        dtype=x.dtype,
    )
    grid = F.affine_grid(matrix.expand(len(x), 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


@torch.no_grad()
def invariance(
    model: nn.Module, x: Tensor, change: Change, levels: Sequence[float], *, batch: int = 500
) -> Invariance:
    r"""Return for how many images the most likely class stays the same under a change of each level.

    .. math:: a(l) = \frac{1}{N} \sum_n \big[ \arg\max f(T_l\, x_n) = \arg\max f(x_n) \big]

    A translation goes in the four directions in turn and a rotation both ways; the shares are averaged.

    Args:
        model: gives logits (N, K); it is run in eval mode and comes back as it was.
        x: images (N, C, H, W), preprocessed as the model expects them.
        change: "translation" by pixels, "rotation" by degrees, or "scale" by factors.
        levels: how much of it.
        batch: images at a time.

    Raises:
        ValueError: if `change` is unknown.
    """
    _require_known(change)
    ways = {
        "translation": [(1.0, angle) for angle in (0.0, 90.0, 180.0, 270.0)],
        "rotation": [(1.0, 0.0), (-1.0, 0.0)],
        "scale": [(1.0, 0.0)],
    }
    kept = torch.zeros(len(levels))
    with evaluating(model):
        for images in x.split(batch):
            answers = model(images).argmax(1)
            for index, level in enumerate(levels):
                for sign, angle in ways[change]:
                    moved = transform_images(images, change, sign * level, angle)
                    kept[index] += (model(moved).argmax(1) == answers).sum().cpu() / len(ways[change])
    data = {
        "levels": np.array(levels, float),
        "agreement": (kept / len(x)).numpy(),
        "change": np.array(change),
    }
    return Invariance(data)
