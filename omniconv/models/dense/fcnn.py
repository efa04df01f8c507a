"""Three fully convolutional networks for segmentation that differ in their blocks and in how maps grow again.

They are the hosts of squeeze and excitation in Roy et al., Recalibrating Fully Convolutional Networks with Spatial and
Channel 'Squeeze & Excitation' Blocks, https://arxiv.org/abs/1808.08127: U-Net, https://arxiv.org/abs/1505.04597,
SD-Net, https://arxiv.org/abs/1705.00938, and one with dense blocks, as in https://arxiv.org/abs/1801.04161. As there,
every convolution has the same width. `omniconv.layers.attention.scse.insert_gates(model, images, model.blocks)` puts a
gate behind every encoder, bottleneck and decoder block.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["FCNN", "DenseBlock"]


def _conv(in_channels: int, out_channels: int, kernel_size: int) -> nn.Sequential:
    """Return convolution, batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class DenseBlock(nn.Module):
    """Two convolutions that see the block's input and each other, and a 1x1 convolution that sees all."""

    def __init__(self, in_channels: int, width: int, kernel_size: int) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, width, kernel_size)
        self.conv2 = _conv(in_channels + width, width, kernel_size)
        self.conv3 = _conv(in_channels + 2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        x = torch.cat((x, self.conv1(x)), 1)
        return self.conv3(torch.cat((x, self.conv2(x)), 1))


_BLOCKS: Mapping[str, Callable[[int, int, int], nn.Module]] = {
    "unet": lambda c, width, k: nn.Sequential(_conv(c, width, k), _conv(width, width, k)),
    "sdnet": _conv,
    "dense": DenseBlock,
}


class FCNN(nn.Module):
    r"""Encoder and decoder of equal width, whose levels of one resolution are joined.

    Args:
        kind: "unet" (two convolutions a block; maps grow by repeating pixels), "sdnet" (one; they grow by unpooling
            to where the maxima were), or "dense" (dense blocks and unpooling).
        classes: of the output.
        in_chans: of the images.
        width: channels of every block.
        levels: encoder blocks, each followed by 2x2 max pooling.
        kernel_size: of the convolutions, odd.

    Shapes:
        - input: :math:`(N, C, H, W)` with sides of at least :math:`2^\mathrm{levels}`
        - output: :math:`(N, K, H, W)`

    Raises:
        ValueError: if `kind` is unknown.
    """

    def __init__(
        self,
        kind: Literal["unet", "sdnet", "dense"] = "unet",
        *,
        classes: int = 2,
        in_chans: int = 1,
        width: int = 64,
        levels: int = 4,
        kernel_size: int = 5,
    ) -> None:
        super().__init__()
        if kind not in _BLOCKS:
            raise ValueError(f"kind must be one of {', '.join(_BLOCKS)}: got {kind!r}")
        block = _BLOCKS[kind]
        self.unpools = kind != "unet"
        self.encoders = nn.ModuleList(
            block(in_chans if level == 0 else width, width, kernel_size) for level in range(levels)
        )
        self.bottleneck = block(width, width, kernel_size)
        self.decoders = nn.ModuleList(block(2 * width, width, kernel_size) for _ in range(levels))
        self.classifier = nn.Conv2d(width, classes, 1)
        self.blocks = [
            *(f"encoders.{level}" for level in range(levels)),
            "bottleneck",
            *(f"decoders.{level}" for level in range(levels)),
        ]

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of every class at every pixel."""
        skips: list[tuple[Tensor, Tensor]] = []
        for encoder in self.encoders:
            x = encoder(x)
            pooled, places = F.max_pool2d(x, 2, return_indices=True)
            skips.append((x, places))
            x = pooled
        x = self.bottleneck(x)
        for decoder in self.decoders:
            skip, places = skips.pop()
            size = skip.shape[2:]
            if self.unpools:
                x = F.max_unpool2d(x, places, [2, 2], output_size=size)
            else:
                x = F.interpolate(x, size=size)
            x = decoder(torch.cat((x, skip), 1))
        return self.classifier(x)
