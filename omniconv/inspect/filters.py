"""The first layer's filters, the one part of a network that can be read as pictures."""

import io
import math
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from omniconv.core.errors import UsageError
from omniconv.inspect.artifact import Artifact

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FilterGrid", "first_layer_filters"]


class FilterGrid(Artifact):
    """Filters of a convolution: `data["filters"]` is (out, in, height, width)."""

    title = "First-layer filters"

    def tiles(self) -> np.ndarray:
        """Return every filter as a picture, (out, height, width, 3) in [0, 1], where 0.5 is a weight of zero.

        Filters over three channels are shown in colour; of any other number, the channel with the largest
        norm is shown in grey. Each filter has its own scale.
        """
        filters = self.data["filters"].astype(np.float64)
        if filters.shape[1] != 3:
            strongest = (filters**2).sum((2, 3)).argmax(1)
            filters = np.repeat(filters[np.arange(len(filters)), strongest][:, None], 3, axis=1)
        peak = np.abs(filters).max((1, 2, 3), keepdims=True)
        return (0.5 + 0.5 * filters / np.where(peak > 0, peak, 1)).transpose(0, 2, 3, 1)

    def grid(self) -> np.ndarray:
        """Return all tiles in one picture with transparent gaps, (H, W, 4) uint8, each enlarged crisply."""
        tiles = (self.tiles() * 255).round().astype(np.uint8)
        count, height, width, _ = tiles.shape
        factor = max(1, math.ceil(36 / min(height, width)))
        tiles = tiles.repeat(factor, axis=1).repeat(factor, axis=2)
        columns = min(count, max(8, math.ceil(math.sqrt(count * 2))))
        rows = math.ceil(count / columns)
        gap = 4
        step_y, step_x = tiles.shape[1] + gap, tiles.shape[2] + gap
        picture = np.zeros((rows * step_y - gap, columns * step_x - gap, 4), np.uint8)
        for index, tile in enumerate(tiles):
            y, x = index // columns * step_y, index % columns * step_x
            picture[y : y + tile.shape[0], x : x + tile.shape[1], :3] = tile
            picture[y : y + tile.shape[0], x : x + tile.shape[1], 3] = 255
        return picture

    def plot(self) -> "Figure":
        """Draw all filters side by side."""
        from matplotlib.figure import Figure

        picture = self.grid()
        figure = Figure(figsize=(picture.shape[1] / 80, picture.shape[0] / 80 + 0.1), layout="constrained")
        axis = figure.subplots()
        axis.imshow(picture, interpolation="nearest")
        axis.set_axis_off()
        return figure

    def png(self) -> bytes:
        """Return the filters alone as the bytes of a PNG file with a transparent background."""
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(self.grid()).save(buffer, format="PNG", optimize=True)
        return buffer.getvalue()


def first_layer_filters(model: nn.Module) -> FilterGrid:
    """Return the filters of the first 2-d convolution of `model`.

    Raises:
        UsageError: if the model has no 2-d convolution.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return FilterGrid({"filters": module.weight.detach().float().cpu().numpy()})
    raise UsageError(f"{type(model).__name__} has no 2-d convolution whose filters could be shown")
