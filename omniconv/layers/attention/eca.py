"""Efficient channel attention: a channel's gate sees its k neighbours, through one shared 1-D kernel.

Paper: Wang et al., ECA-Net, https://arxiv.org/abs/1910.03151. Where squeeze-and-excitation spends
2 C^2 / r weights, this layer spends k.
"""

import math

from torch import Tensor, nn

from omniconv.core.cases import Case, Raises

__all__ = ["EfficientChannelAttention", "eca_kernel_size"]


def eca_kernel_size(channels: int, gamma: float = 2.0, b: float = 1.0) -> int:
    r"""Return the odd kernel size :math:`k = |\log_2 C / \gamma + b / \gamma|_\mathrm{odd}`.

    The floor is taken before the step to the next odd number, and sizes start at 3, as in the authors' code.
    """
    t = int(abs(math.log2(channels) + b) / gamma)
    return max(3, t if t % 2 else t + 1)


class EfficientChannelAttention(nn.Module):
    r"""Channel gate of `ECA-Net <https://arxiv.org/abs/1910.03151>`_.

    .. math:: y = x \cdot \sigma(w * z), \qquad z_c = \frac{1}{HW} \sum_{h,w} x_{chw}

    where :math:`*` is a 1-D convolution of k weights along the channels, with zeros beyond both ends.

    Args:
        channels: channels C of the input; chooses k when `kernel_size` is None.
        kernel_size: k, odd.
        device, dtype: of the parameters.

    Shapes:
        - input and output: :math:`(N, C, H, W)`

    Raises:
        ValueError: if `kernel_size` is even or not positive.
    """

    def __init__(self, channels: int, kernel_size: int | None = None, *, device=None, dtype=None) -> None:
        super().__init__()
        k = eca_kernel_size(channels) if kernel_size is None else kernel_size
        if k < 1 or k % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive: got {k}")
        self.conv = nn.Conv1d(1, 1, k, padding=k // 2, bias=False, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw new weights."""
        self.conv.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Scale every channel of `x` by its gate."""
        z = x.mean((2, 3)).unsqueeze(1)
        return x * self.conv(z).sigmoid().squeeze(1)[:, :, None, None]


CASES = (
    Case(
        EfficientChannelAttention,
        {"channels": 12, "kernel_size": 5},
        inputs=((2, 12, 7, 5),),
        output=(2, 12, 7, 5),
        minimal=(1, 12, 1, 1),
        raises=(
            Raises(
                ValueError,
                "kernel_size must be odd and positive: got 4",
                {"channels": 8, "kernel_size": 4},
            ),
        ),
    ),
)
