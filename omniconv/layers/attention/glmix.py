"""GLMix: convolution on the fine grid beside attention between a few soft clusters of pixels.

Paper: Zhu et al., https://arxiv.org/abs/2411.14429. Attention between S slots costs S^2, and gathering and dispatching
them S for each pixel, where attention between L pixels costs L^2.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.cases import Case, Raises
from omniconv.layers.attention.self_attention import SelfAttention2d

__all__ = ["GLMix"]


class GLMix(nn.Module):
    r"""Token mixer of `GLNet <https://arxiv.org/abs/2411.14429>`_.

    .. math:: y = D^\top \mathrm{MHA}(G x) + \mathrm{local}(x), \qquad
              G = \mathrm{softmax}_l(\Lambda), \quad D = \mathrm{softmax}_s(\Lambda), \quad
              \Lambda_{sl} = \tau \cos(z_s, x_l)

    for pixels l and slots s, where z are averages of the seeds over a grid, :math:`\tau` is learned, and local is a
    1x1, a depthwise and a 1x1 convolution.

    Args:
        channels: channels C.
        heads: of the attention between slots, a divisor of C.
        slots: S, a square number.
        kernel_size: of the depthwise convolution, odd.
        device, dtype: of the parameters.

    Shapes:
        - input and output: :math:`(N, C, H, W)`
        - seeds: :math:`(N, C, H, W)`, the map that the slots start from

    Raises:
        ValueError: if `slots` is no square number or `kernel_size` is even.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        *,
        slots: int = 64,
        kernel_size: int = 5,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.side = math.isqrt(slots)
        if slots < 1 or self.side**2 != slots:
            raise ValueError(f"slots must be a square number: got {slots}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive: got {kernel_size}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.scale = nn.Parameter(torch.full((), channels**-0.5, **factory))
        self.attention = SelfAttention2d(channels, heads, **factory)
        margin = kernel_size // 2
        self.local = nn.Sequential(
            nn.Conv2d(channels, channels, 1, **factory),
            nn.Conv2d(channels, channels, kernel_size, padding=margin, groups=channels, **factory),
            nn.Conv2d(channels, channels, 1, **factory),
        )

    def reset_parameters(self) -> None:
        """Draw new weights."""
        nn.init.constant_(self.scale, self.attention.proj.in_features**-0.5)
        self.attention.reset_parameters()
        for conv in self.local:
            assert isinstance(conv, nn.Conv2d)
            conv.reset_parameters()

    def similarity(self, x: Tensor, seeds: Tensor) -> Tensor:
        """Return the scaled cosines (N, S, HW) between slots and pixels."""
        slots = F.adaptive_avg_pool2d(seeds, self.side)
        slots, pixels = (F.normalize(y.flatten(2), dim=1) for y in (slots, x))
        return slots.transpose(1, 2) @ (self.scale * pixels)

    def mix_slots(self, x: Tensor, seeds: Tensor) -> Tensor:
        """Return the global branch: gather the pixels in slots, let these attend to each other, dispatch them."""
        logits = self.similarity(x, seeds)
        pixels = x.permute(0, 2, 3, 1).flatten(1, 2)
        slots = logits.softmax(2) @ pixels
        slots = self.attention(slots.transpose(1, 2).unflatten(2, (self.side, self.side)))
        y = logits.softmax(1).transpose(1, 2) @ slots.flatten(2).transpose(1, 2)
        return y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)

    def forward(self, x: Tensor, seeds: Tensor) -> Tensor:
        """Add what slots and neighbours say about every pixel."""
        return self.mix_slots(x, seeds) + self.local(x)


CASES = (
    Case(
        GLMix,
        {"channels": 6, "heads": 2, "slots": 4, "kernel_size": 3},
        inputs=((2, 6, 7, 5), (2, 6, 7, 5)),
        output=(2, 6, 7, 5),
        raises=(
            Raises(
                ValueError, "slots must be a square number: got 6", {"channels": 6, "heads": 2, "slots": 6}
            ),
            Raises(
                ValueError,
                "kernel_size must be odd and positive: got 4",
                {"channels": 6, "heads": 2, "kernel_size": 4},
            ),
        ),
    ),
)
