"""A detector split at a narrow bottleneck in eight bits, and a filter for images that need not be sent at all.

Paper: Matsubara and Levorato, Neural Compression and Filtering for Edge-assisted Real-time Object Detection in
Challenged Networks, https://arxiv.org/abs/2007.15818. `distill_head` trains the bottleneck: with the replaced layer
alone it is head network distillation (HND), with several layers its generalised form (GHND). The offset of the
eight-bit codec is the latent's least value rather than an integer zero point, which would shift values by up to half
a step.
"""

import math
import struct
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.deploy.split.network import Parts

__all__ = ["EightBitCodec", "NeuralFilter", "QuantizedBottleneck", "recall_threshold"]

_SCALE = struct.Struct("!ff")


class EightBitCodec(nn.Module):
    r"""Eight bits a value, with a step and an offset for each image.

    .. math:: q = \mathrm{round}\Bigl(\frac{y - \min y}{s}\Bigr), \qquad s = \frac{\max y - \min y}{255}, \qquad
              \hat y = \min y + s\, q

    A message has 8 + C H W bytes. In training the latent passes unchanged: quantisation comes after it.

    Args:
        channels: C of the latent.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def _codes(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flat = y.flatten(1)
        low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
        step = ((high - low) / 255).clamp(min=torch.finfo(y.dtype).tiny)
        return ((flat - low) / step).round().clamp(0, 255), step, low

    def quantise(self, y: Tensor) -> Tensor:
        """Return the latent as the receiver sees it; unchanged in training."""
        if self.training:
            return y
        codes, step, low = self._codes(y)
        return (low + step * codes).reshape(y.shape)

    def compress(self, y: Tensor) -> list[bytes]:
        """Return the bytes of each sample of `y` (N, C, H, W).

        Raises:
            ValueError: if a value is not finite.
        """
        if not bool(y.isfinite().all()):
            raise ValueError("a latent must be finite to be coded: mind the learning rate of its encoder")
        codes, step, low = (part.cpu() for part in self._codes(y.float()))
        samples = zip(codes.to(torch.uint8).numpy(), step[:, 0].tolist(), low[:, 0].tolist(), strict=True)
        return [_SCALE.pack(s, offset) + sample.tobytes() for sample, s, offset in samples]

    def decompress(self, messages: list[bytes], shape: tuple[int, ...]) -> Tensor:
        """Return the samples (N, C, *shape) of messages of `compress`.

        Raises:
            ValueError: if a message has another length, or a step or offset that is not finite.
        """
        count = self.channels * shape[0] * shape[1]
        samples = []
        for message in messages:
            if len(message) != _SCALE.size + count:
                raise ValueError(
                    f"a message of this latent has {_SCALE.size + count} bytes: got {len(message)}"
                )
            scale = torch.tensor(_SCALE.unpack_from(message))
            if not bool(scale.isfinite().all()):
                raise ValueError("step and offset of a message must be finite")
            codes = torch.frombuffer(bytearray(message[_SCALE.size :]), dtype=torch.uint8).float()
            samples.append((scale[1] + scale[0] * codes).reshape(self.channels, *shape))
        return torch.stack(samples)


def _conv(in_channels: int, out_channels: int, padding: int, act: bool) -> list[nn.Module]:
    """Return a 2x2 convolution and batch norm, and ReLU if `act`."""
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, out_channels, 2, padding=padding, bias=False), nn.BatchNorm2d(out_channels)
    ]  # fmt: skip
    return [*layers, nn.ReLU()] if act else layers


@dataclass(frozen=True)
class QuantizedBottleneck:
    """Bottleneck of `GHND <https://arxiv.org/abs/2007.15818>`_ in place of a layer that keeps the resolution.

    Encoder, from the layer's input: padded 2x2 convolutions to width, 4 widths, width and B channels; each makes the
    map a row and a column larger. Decoder: unpadded ones to width, 2 widths, T and T channels. The width is that of
    the layer's input (64 in the paper's ResNets).

    Attributes:
        channels: B, of the latent; 3, 6, 9 or 12 in the paper.

    Raises:
        ValueError: if the layer changes the resolution.
    """

    channels: int = 3

    def __call__(self, image: Tensor, early: Tensor, target: Tensor) -> Parts:
        """Return new parts for a layer that makes `target` of `early`."""
        if early.shape[2:] != target.shape[2:]:
            raise ValueError(
                f"the layer must keep the resolution: got {tuple(early.shape)} to {tuple(target.shape)}"
            )
        width, wide = early.shape[1], target.shape[1]
        encoder = nn.Sequential(
            *_conv(width, width, 1, act=False),
            *_conv(width, 4 * width, 1, act=True),
            *_conv(4 * width, width, 1, act=False),
            nn.Conv2d(width, self.channels, 2, padding=1, bias=False),
        )
        decoder = nn.Sequential(
            nn.BatchNorm2d(self.channels),
            nn.ReLU(),
            *_conv(self.channels, width, 0, act=False),
            *_conv(width, 2 * width, 0, act=True),
            *_conv(2 * width, wide, 0, act=False),
            *_conv(wide, wide, 0, act=True),
        )
        return Parts(encoder, EightBitCodec(self.channels), decoder, reads_image=False)


class NeuralFilter(nn.Module):
    """Classifier on early features that says whether an image holds anything worth sending.

    As in the authors' code: averages over a 64x64 grid, two strided 4x4 convolutions of 64 and 32 units with averages
    over 16x16 and 4x4 grids behind them, and one linear layer. Maps that are smaller than a grid are not enlarged.

    Args:
        channels: of the features, which the stem of a `SplitNetwork` gives.

    Shapes:
        - input: :math:`(N, C, H, W)`
        - output: :math:`(N,)`, logits
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(channels, 64, 4, 2), nn.BatchNorm2d(64), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(64, 32, 4, 2), nn.BatchNorm2d(32), nn.ReLU())
        self.linear = nn.Linear(32 * 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of there being an object."""
        height, width = x.shape[2:]
        # Below ten rows the second convolution would have nothing to stand on.
        x = self.first(F.adaptive_avg_pool2d(x, (max(10, min(64, height)), max(10, min(64, width)))))
        x = self.second(F.adaptive_avg_pool2d(x, (min(16, x.shape[2]), min(16, x.shape[3]))))
        return self.linear(F.adaptive_avg_pool2d(x, 4).flatten(1)).flatten()


def recall_threshold(scores: Tensor, labels: Tensor, recall: float) -> float:
    """Return the largest threshold at which at least this share of the positive images is kept (`score >= threshold`).

    Args:
        scores: (N,) of validation images.
        labels: (N,) 1 where there is an object.
        recall: share of the images with an object that must be sent, in (0, 1].

    Raises:
        ValueError: if no image has an object, or `recall` lies outside (0, 1].
    """
    positive = scores[labels > 0].sort(descending=True).values
    if not len(positive) or not 0 < recall <= 1:
        raise ValueError(
            f"recall must lie in (0, 1] and some image have an object: got {recall}, {len(positive)}"
        )
    kept = math.ceil(recall * len(positive) - 1e-9)  # 0.95 of 20 is 19, and a little more in binary
    return float(positive[kept - 1])
