"""From raw pixels to what a network takes, as a module that travels with the network into its exports."""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Preprocess", "resize"]


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Return float images (N, C, H, W) resized to `size` (height, width), bilinear and antialiased."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=True)


class Preprocess(nn.Module):
    r"""Scale, resize and normalise raw images.

    .. math:: y = \frac{\mathrm{resize}\bigl((x - l) / (h - l)\bigr) - \mu}{\sigma}

    The resize is bilinear and antialiased, so that an image of any size gives what a person would see at
    `size`; an image that has this size already is left as it is.

    Args:
        size: output size in pixels, one number for a square or (height, width).
        mean: :math:`\mu` of every channel, on the scale from 0 to 1.
        std: :math:`\sigma` of every channel, on the scale from 0 to 1.
        low: raw value :math:`l` that becomes 0.
        high: raw value :math:`h` that becomes 1.

    Shapes:
        - input: :math:`(N, C, H, W)`, uint8 or float, raw pixel values
        - output: :math:`(N, C, h, w)`, float32

    Raises:
        ValueError: if a size or a standard deviation is not positive, mean and std differ in length, or
            `high` is not above `low`.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        size: int | Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
        low: float = 0.0,
        high: float = 255.0,
    ) -> None:
        super().__init__()
        height, width = (size, size) if isinstance(size, int) else size
        if height < 1 or width < 1:
            raise ValueError(f"size must be positive: got {height} x {width}")
        if len(mean) != len(std):
            raise ValueError(f"mean and std must have one value a channel: got {len(mean)} and {len(std)}")
        if min(std) <= 0:
            raise ValueError(f"std must be positive: got {min(std)}")
        if high <= low:
            raise ValueError(f"high must be above low: got {high} and {low}")
        self.size = (int(height), int(width))
        self.low, self.high = float(low), float(high)
        self._numbers = ([float(value) for value in mean], [float(value) for value in std])
        # Not persistent: the numbers stand in the header of the weight file, where people can read them.
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1), persistent=False)

    def scale(self, x: Tensor) -> Tensor:
        """Return raw pixel values as float32 from 0 (`low`) to 1 (`high`)."""
        return (x.float() - self.low) / (self.high - self.low)

    def normalise(self, x: Tensor) -> Tensor:
        """Return images scaled to 0..1 with `mean` taken off, in units of `std`."""
        return (x - self.mean) / self.std

    def forward(self, x: Tensor) -> Tensor:
        """Return what the network takes for raw images `x`."""
        x = self.scale(x)
        # A resize to the same size changes nothing; a graph that must take any size cannot branch on it.
        if torch.compiler.is_compiling() or x.shape[-2:] != self.size:
            x = resize(x, self.size)
        return self.normalise(x)

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments as plain numbers and lists, for a JSON header."""
        return {
            "size": list(self.size),
            "mean": list(self._numbers[0]),
            "std": list(self._numbers[1]),
            "low": self.low,
            "high": self.high,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Return the module that `to_dict` described."""
        return cls(**values)

    def extra_repr(self) -> str:
        """Show size and range."""
        return f"size={self.size}, low={self.low:g}, high={self.high:g}"
