"""Oversized convolution: bands almost twice as long as the map, so that every output sees every input on its axis.

Paper: Xu et al., ParCNetV2, https://arxiv.org/abs/2211.07157. In place of ParCNet's circular kernels the map ends in
zeros, by which an output can tell where it is.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.cases import Case, Raises

__all__ = ["OversizedConv2d"]


class OversizedConv2d(nn.Module):
    r"""Oversized convolution of `ParCNetV2 <https://arxiv.org/abs/2211.07157>`_.

    .. math:: y = k_{1 \times K} * (k_{K \times 1} * x)

    with one band a channel and zeros beyond the map. For a map of H x W, :math:`K = 2 H - 1` rows and
    :math:`2 W - 1` columns reach from every pixel to every other on its axis. Parameter names are those of the public
    weights.

    Args:
        channels: channels C.
        kernel_size: K, odd.
        resize: stretch the bands bilinearly to 2 H - 1 and 2 W - 1, whatever the map, instead of taking them as
            they are.
        device, dtype: of the parameters.

    Shapes:
        - input and output: :math:`(N, C, H, W)`

    Raises:
        ValueError: if `kernel_size` is even.
    """

    def __init__(
        self, channels: int, kernel_size: int, *, resize: bool = False, device=None, dtype=None
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive: got {kernel_size}")
        options: dict[str, Any] = {"groups": channels, "bias": False, "device": device, "dtype": dtype}
        margin = kernel_size // 2
        self.conv_h = nn.Conv2d(channels, channels, (kernel_size, 1), padding=(margin, 0), **options)
        self.conv_w = nn.Conv2d(channels, channels, (1, kernel_size), padding=(0, margin), **options)
        self.resize = resize

    def reset_parameters(self) -> None:
        """Draw new weights."""
        self.conv_h.reset_parameters()
        self.conv_w.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Convolve the columns of `x`, then its rows."""
        if not self.resize:
            return self.conv_w(self.conv_h(x))
        height, width = x.shape[2:]
        column = _stretch(self.conv_h.weight, (2 * height - 1, 1))
        row = _stretch(self.conv_w.weight, (1, 2 * width - 1))
        # torch's own convolution: kernels that grow with the map would have programs compiled anew for other sizes
        # wherever the choice of an implementation changes.
        y = F.conv2d(x, column, padding=(height - 1, 0), groups=x.shape[1])
        return F.conv2d(y, row, padding=(0, width - 1), groups=x.shape[1])


def _stretch(band: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(band, size, mode="bilinear", align_corners=True)


CASES = (
    Case(
        OversizedConv2d,
        {"channels": 3, "kernel_size": 13},
        inputs=((2, 3, 7, 5),),
        output=(2, 3, 7, 5),
        minimal=(1, 3, 1, 1),
        raises=(
            Raises(
                ValueError, "kernel_size must be odd and positive: got 4", {"channels": 8, "kernel_size": 4}
            ),
        ),
    ),
    Case(
        OversizedConv2d,
        {"channels": 3, "kernel_size": 9, "resize": True},
        inputs=((2, 3, 7, 5),),
        output=(2, 3, 7, 5),
        id="resize",
        minimal=(1, 3, 1, 1),
    ),
)
