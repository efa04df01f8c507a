"""Convolutions that are padded at one corner, and their inverse as a layer: volume-preserving maps between images.

Paper: Nagar and Varma, Parallel Backpropagation for Inverse of a Convolution with Application to Normalizing Flows,
https://arxiv.org/abs/2410.14634. A flow that runs the inverse from data to latent variables samples with ordinary
convolutions alone.
"""

import torch
from torch import Tensor, nn

from omniconv.core.cases import Case, Raises
from omniconv.ops.inverse_conv.api import corner_conv, inverse_conv

__all__ = ["CornerConv2d", "InverseConv2d"]

CORNERS: dict[str, tuple[int, ...]] = {
    "top-left": (),
    "top-right": (3,),
    "bottom-left": (2,),
    "bottom-right": (2, 3),
}
"""Axes along which maps are flipped so that the corner is at the top left."""


class CornerConv2d(nn.Module):
    r"""Invertible convolution of `FInC Flow <https://arxiv.org/abs/2301.09266>`_, padded at one corner.

    .. math:: y_{i,j} = \sum_{a,b=0}^{k-1} W_{k-1-a,k-1-b}\, x_{i-a,j-b}, \qquad W_{k-1,k-1} = L

    for the top left corner, where L is lower triangular with a unit diagonal; the others are its mirror images. The
    determinant of its Jacobian is 1.

    Args:
        channels: C.
        kernel_size: k.
        corner: which one is padded: top-left, top-right, bottom-left or bottom-right.
        device, dtype: of the parameters.

    Shapes:
        - input and output: :math:`(N, C, H, W)`

    Raises:
        ValueError: if `kernel_size` is not positive or `corner` is none of the four.
    """

    def __init__(
        self, channels: int, kernel_size: int = 3, corner: str = "top-left", *, device=None, dtype=None
    ) -> None:
        super().__init__()
        if kernel_size < 1:
            raise ValueError(f"kernel_size must be positive: got {kernel_size}")
        if corner not in CORNERS:
            raise ValueError(f"corner must be one of {', '.join(CORNERS)}: got {corner!r}")
        self.axes = CORNERS[corner]
        shape = (channels, channels, kernel_size, kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw small weights: the layer starts near the identity."""
        nn.init.normal_(self.weight, std=0.05)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve `x`."""
        return corner_conv(x, self.weight, self.axes)

    def inverse(self, y: Tensor) -> Tensor:
        """Return the maps whose convolution is `y`."""
        return inverse_conv(y.flip(self.axes), self.weight).flip(self.axes)

    def extra_repr(self) -> str:
        """Say what was asked for."""
        corner = next(name for name, axes in CORNERS.items() if axes == self.axes)
        return f"{self.weight.shape[0]}, kernel_size={self.weight.shape[2]}, corner={corner!r}"


class InverseConv2d(CornerConv2d):
    r"""The other way round: the inverse of a corner convolution forwards, the convolution as its inverse.

    Layer of `Inverse-Flow <https://arxiv.org/abs/2410.14634>`_.

    .. math:: x_{i,j} = W_{k-1,k-1}^{-1} \Bigl( y_{i,j} - \sum_{(a,b) \neq (0,0)} W_{k-1-a,k-1-b}\, x_{i-a,j-b} \Bigr)

    Args:
        channels: C.
        kernel_size: k.
        corner: which one is padded: top-left, top-right, bottom-left or bottom-right.
        device, dtype: of the parameters.

    Shapes:
        - input and output: :math:`(N, C, H, W)`

    Raises:
        ValueError: if `kernel_size` is not positive or `corner` is none of the four.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the maps whose convolution is `x`."""
        return super().inverse(x)

    def inverse(self, y: Tensor) -> Tensor:
        """Convolve `y`."""
        return super().forward(y)


CASES = (
    Case(
        CornerConv2d,
        {"channels": 4, "kernel_size": 3, "corner": "bottom-left"},
        inputs=((2, 4, 7, 5),),
        output=(2, 4, 7, 5),
        minimal=(1, 4, 1, 1),
        raises=(
            Raises(
                ValueError,
                "corner must be one of top-left, top-right, bottom-left, bottom-right: got 'left'",
                {"corner": "left"},
            ),
            Raises(ValueError, "kernel_size must be positive: got 0", {"kernel_size": 0}),
        ),
    ),
    Case(
        InverseConv2d,
        {"channels": 3, "kernel_size": 2},
        inputs=((2, 3, 4, 5),),
        output=(2, 3, 4, 5),
        # Compiled and exported programs have a fixed number of steps.
        vary=(0,),
        minimal=(1, 3, 1, 1),
    ),
)
