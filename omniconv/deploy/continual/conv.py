"""Continual convolutions: one output frame for the multiply-adds of one output frame.

Paper: Hedegaard, Efficient Online Processing with Deep Neural Networks, https://arxiv.org/abs/2306.13474. There the
partial sums of outputs to come are kept; here the input frames are, which costs the same multiply-adds and gives the
bits of the clip's convolution.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.deploy.continual.stream import Window

__all__ = ["ContinualConv1d", "ContinualConv2d", "ContinualConv3d"]

_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class _ContinualConv(Window, nn.modules.conv._ConvNd):
    r"""Convolution whose first axis behind the channels is time.

    .. math:: y_n = \sum_{k} W_k * x_{n s - p + d k}

    Arguments, parameters and `forward` are those of torch's layer, zero padding over time included.

    Shapes:
        - clip: :math:`(N, C, T, ...)`
        - frame: :math:`(N, C, ...)`
    """

    def window(self) -> tuple[int, int, int, int]:
        """Return length, stride and padding over time."""
        length = self.dilation[0] * (self.kernel_size[0] - 1) + 1
        before, after = self._reversed_padding_repeated_twice[-2:]
        if before or after:
            if self.padding_mode != "zeros":
                raise ValueError(f"padding over time must be zeros to stream: got {self.padding_mode}")
            if max(before, after) >= length:
                raise ValueError(f"padding over time must be shorter than the kernel: got {before}, {length}")
        return length, self.stride[0], before, after

    def compute(self, clip: Tensor) -> Tensor:
        """Convolve without padding over time."""
        sides = [*self._reversed_padding_repeated_twice[:-2], 0, 0]
        padding = sides[-2::-2]
        if self.padding_mode != "zeros" or sides[::2] != sides[1::2]:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            clip, padding = F.pad(clip, sides, mode), [0] * len(padding)
        convolve = _CONVOLVE[len(self.kernel_size)]
        return convolve(clip, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)


class ContinualConv1d(_ContinualConv, nn.Conv1d):
    """Streaming `torch.nn.Conv1d` over (N, C, T); see `Continual inference <https://arxiv.org/abs/2306.13474>`_."""


class ContinualConv2d(_ContinualConv, nn.Conv2d):
    """Streaming `torch.nn.Conv2d` over (N, C, T, V): joints of a skeleton, bins of a spectrum, rows of a picture."""


class ContinualConv3d(_ContinualConv, nn.Conv3d):
    """Streaming `torch.nn.Conv3d` over (N, C, T, H, W)."""
