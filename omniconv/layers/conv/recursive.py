"""Recursive convolution: one small kernel goes down a pyramid, others come up again.

Paper: Zhao et al., RecConv, https://arxiv.org/abs/2412.19628. With l levels the receptive field grows to k 2^l, the
parameters to l + 2 kernels, and the multiply-adds to less than 5/3 of one convolution.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.cases import Case, Raises

__all__ = ["RecursiveConv2d"]


class RecursiveConv2d(nn.Module):
    r"""Token mixer of RecNeXt, from `RecConv <https://arxiv.org/abs/2412.19628>`_.

    .. math:: x_{i+1} = d *_2 x_i, \qquad u_l = 0, \qquad u_i = \mathrm{up}(k_i * (x_{i+1} + u_{i+1})), \qquad
              y = k_l * (x_0 + u_0)

    where d is one depthwise kernel of stride 2 for all levels, and up resizes bilinearly to the size of
    :math:`x_i`. Parameter names are those of the public weights: `convs` begin with the coarsest level.

    Args:
        channels: channels C.
        kernel_size: k, odd.
        levels: l; 0 leaves one depthwise convolution (and no d).
        device, dtype: of the parameters.

    Shapes:
        - input and output: :math:`(N, C, H, W)`

    Raises:
        ValueError: if `kernel_size` is even or `levels` is negative.
    """

    def __init__(
        self, channels: int, kernel_size: int = 5, levels: int = 2, *, device=None, dtype=None
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive: got {kernel_size}")
        if levels < 0:
            raise ValueError(f"levels must not be negative: got {levels}")
        self.levels = levels

        def depthwise(stride: int) -> nn.Conv2d:
            options: dict[str, Any] = {"groups": channels, "bias": False, "device": device, "dtype": dtype}
            return nn.Conv2d(channels, channels, kernel_size, stride, kernel_size // 2, **options)

        self.down = depthwise(2) if levels else nn.Identity()
        self.convs = nn.ModuleList(depthwise(1) for _ in range(levels + 1))

    def reset_parameters(self) -> None:
        """Draw new weights."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Return the map that all levels have gone into."""
        pyramid = [x]
        for _ in range(self.levels):
            pyramid.append(self.down(pyramid[-1]))
        *coarse, last = self.convs
        above: Tensor | None = None
        for conv in coarse:
            level = pyramid.pop()
            y = conv(level if above is None else level + above)
            above = F.interpolate(y, pyramid[-1].shape[2:], mode="bilinear")
        return last(x if above is None else x + above)


CASES = (
    Case(
        RecursiveConv2d,
        {"channels": 4, "kernel_size": 3, "levels": 2},
        inputs=((2, 4, 13, 10),),
        output=(2, 4, 13, 10),
        minimal=(1, 4, 1, 1),
        raises=(
            Raises(
                ValueError, "kernel_size must be odd and positive: got 4", {"channels": 4, "kernel_size": 4}
            ),
            Raises(ValueError, "levels must not be negative: got -1", {"channels": 4, "levels": -1}),
        ),
    ),
    Case(
        RecursiveConv2d,
        {"channels": 3, "levels": 0},
        inputs=((2, 3, 5, 7),),
        output=(2, 3, 5, 7),
        id="plain",
        minimal=(1, 3, 1, 1),
    ),
)
