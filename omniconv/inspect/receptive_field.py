"""Effective receptive field: how much every input pixel moves one unit of a feature map.

Papers: Luo et al., https://arxiv.org/abs/1701.04128; the area ratio is that of Ding et al., RepLKNet,
https://arxiv.org/abs/2203.06717, taken of the contributions themselves instead of their logarithms. Channels are
summed with random signs: their plain sum, as often used, is constant behind a layer norm and has no gradient.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from omniconv.core.errors import UsageError
from omniconv.core.seeds import generator
from omniconv.inspect.artifact import Artifact
from omniconv.inspect.modes import evaluating
from omniconv.models.backbone import Backbone

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ReceptiveField", "receptive_field"]


class ReceptiveField(Artifact):
    """Receptive field of one unit: `data["contribution"]` is (H, W), `data["unit"]` the unit's row and column."""

    title = "Effective receptive field"

    @property
    def support(self) -> np.ndarray:
        """Which input pixels the unit depends on at all, (H, W)."""
        return self.data["contribution"] > 0

    @property
    def bounds(self) -> tuple[int, int, int, int]:
        """First row, last row, first column and last column of the support."""
        rows, columns = (np.flatnonzero(self.support.any(axis)) for axis in (1, 0))
        if not len(rows):
            raise UsageError("the unit depends on no input pixel")
        return int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])

    def area_ratio(self, share: float = 0.5) -> float:
        r"""Return the area of the smallest centred square with `share` of all contributions, over the input's.

        .. math:: r(t) = \min \Big\{ \frac{a^2}{HW} : \sum_{|y - y_0|, |x - x_0| < a / 2} C_{yx}
            \ge t \sum_{yx} C_{yx} \Big\}

        The square's middle is the middle of the input, its side odd; what of it lies outside is not counted.
        """
        if not 0 < share <= 1:
            raise ValueError(f"share must lie in (0, 1]: got {share}")
        contribution = self.data["contribution"].astype(np.float64)
        height, width = contribution.shape
        rows, columns = np.ogrid[:height, :width]
        distance = np.maximum(abs(rows - height // 2), abs(columns - width // 2))
        inside = np.bincount(distance.ravel(), contribution.ravel()).cumsum()
        # Rounding must not keep the largest square from holding everything.
        radius = int(np.searchsorted(inside, share * inside[-1] * (1 - 1e-12)))
        return float((distance <= radius).mean())

    def plot(self) -> "Figure":
        """Draw the contributions, each relative to the largest, on a scale that shows the faint ones."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4.5, 4), layout="constrained")
        axis = figure.subplots()
        contribution = self.data["contribution"]
        shown = axis.imshow((contribution / max(contribution.max(), 1e-30)) ** 0.25, cmap="inferno")
        axis.set_title(f"half of it within {self.area_ratio(0.5):.1%} of the image", fontsize=9)
        axis.set_axis_off()
        figure.colorbar(shown, label="fourth root of the relative contribution")
        return figure


def receptive_field(
    model: nn.Module | Callable[[Tensor], Tensor], x: Tensor, unit: tuple[int, int] | None = None
) -> ReceptiveField:
    r"""Return how much every pixel of `x` contributes to one unit of the model's feature map.

    .. math:: C_{yx} = \frac{1}{N} \sum_{n,c} \Big| \frac{\partial}{\partial x_{ncyx}}
        \sum_k s_k f_{nkij}(x) \Big|, \qquad s_k = \pm 1

    Args:
        model: a network of `create_model`, of which `forward_features` is looked at, or any module or function from
            images to a map (N, K, h, w). A module is run in eval mode and comes back as it was.
        x: images (N, C, H, W): real ones for the field of a trained network, noise for its reach.
        unit: row i and column j on the map; the middle by default.

    Raises:
        UsageError: if the output is not a map, or does not depend on the images.
        ValueError: if `x` is not a batch of images or `unit` lies outside the map.
    """
    if x.ndim != 4:
        raise ValueError(f"x must be a batch of images (N, C, H, W): got shape {tuple(x.shape)}")
    function = model.forward_features if isinstance(model, Backbone) else model
    mode = evaluating(model) if isinstance(model, nn.Module) else nullcontext()
    with mode, torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        y = function(x)
        if not isinstance(y, Tensor) or y.ndim != 4:
            raise UsageError("the model gives no feature map (N, C, H, W); hand in the part that does")
        height, width = y.shape[2:]
        row, column = (height // 2, width // 2) if unit is None else unit
        if not (0 <= row < height and 0 <= column < width):
            raise ValueError(f"unit must lie within {height} x {width}: got {(row, column)}")
        signs = torch.randint(2, (y.shape[1],), generator=generator(0, "receptive field")) * 2 - 1
        score = (y[:, :, row, column] * signs.to(y)).sum()
        if not score.requires_grad:
            raise UsageError("the feature map does not depend on the images")
        (gradient,) = torch.autograd.grad(score, x)
    contribution = gradient.abs().sum(1).mean(0)
    return ReceptiveField({"contribution": contribution.cpu().numpy(), "unit": np.array([row, column])})
