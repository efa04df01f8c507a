"""Terminator: a network of slow-fast blocks without residual additions, strides or pooling between them.

Paper: Zhang, HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction,
https://arxiv.org/abs/2401.17948.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from omniconv.core.cases import Case
from omniconv.layers.conv.hyperzzw import SlowFastBlock

__all__ = ["Terminator"]


class Terminator(nn.Module):
    r"""`Terminator <https://arxiv.org/abs/2401.17948>`_: slow-fast blocks at full resolution, each of which reads the
    outputs of the two before it.

    .. math:: y_i = B_i([y_{i-1}, y_{i-2}])

    Args:
        in_channels: channels of the input.
        classes: number of logits.
        channels: outputs of every block, even.
        depth: number of blocks.
        axes: 1 for sequences, 2 for images.
        dropout: of every block.
        device, dtype: of the parameters.

    Shapes:
        - input: :math:`(N, C, H, W)` or :math:`(N, C, L)`
        - output: :math:`(N, K)` for K classes

    Raises:
        ValueError: if `channels` is odd or `axes` not 1 or 2.
    """

    def __init__(
        self,
        in_channels: int,
        classes: int,
        channels: int = 16,
        depth: int = 3,
        axes: int = 2,
        dropout: float = 0.0,
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        widths = [in_channels, channels, *[2 * channels] * depth][:depth]
        self.blocks = nn.ModuleList(
            SlowFastBlock(width, channels, axes, dropout=dropout, **options) for width in widths
        )
        self.head = nn.Linear(channels, classes, **options)

    def reset_parameters(self) -> None:
        """Draw new weights."""
        for module in (*self.blocks, self.head):
            module.reset_parameters()  # pyright: ignore[reportCallIssue]

    def features(self, x: Tensor) -> list[Tensor]:
        """Return the output of every block."""
        outputs: list[Tensor] = []
        for block in self.blocks:
            outputs.append(block(torch.cat(outputs[-2:], 1) if outputs else x))
        return outputs

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.head(self.features(x)[-1].flatten(2).mean(2))

    def forward_with_slow_loss(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits and the mean local feedback of the blocks, to be added to the loss with a small weight."""
        outputs = self.features(x)
        losses = [cast(SlowFastBlock, b).slow_loss(y) for b, y in zip(self.blocks, outputs, strict=True)]
        return self.head(outputs[-1].flatten(2).mean(2)), torch.stack(losses).mean()


CASES = (
    Case(
        Terminator,
        {"in_channels": 1, "classes": 5, "channels": 4},
        inputs=((2, 1, 6, 7),),
        output=(2, 5),
        vary=(0,),
        minimal=(1, 1, 1, 1),
    ),
)
