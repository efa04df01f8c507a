"""Global response normalisation: channels compete by the energy of their whole maps.

Paper: Woo et al., ConvNeXt V2, https://arxiv.org/abs/2301.00808. The sums run over all positions, so the
same module serves signals, images and volumes.
"""

import torch
from torch import Tensor, nn

from omniconv.core.cases import Case, Raises

__all__ = ["GlobalResponseNorm", "global_response_norm"]


def global_response_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-6, channels_last: bool = False
) -> Tensor:
    """Apply the equation of `GlobalResponseNorm` to `x`, with `weight` and `bias` of C elements."""
    axis = x.ndim - 1 if channels_last else 1
    positions = [dim for dim in range(1, x.ndim) if dim != axis]
    shape = [1] * x.ndim
    shape[axis] = -1
    energy = torch.linalg.vector_norm(x, dim=positions, keepdim=True)
    relative = energy / (energy.mean(axis, keepdim=True) + eps)
    y = x * (1 + weight.reshape(shape) * relative)
    return y if bias is None else y + bias.reshape(shape)


class GlobalResponseNorm(nn.Module):
    r"""Global response normalisation of `ConvNeXt V2 <https://arxiv.org/abs/2301.00808>`_.

    .. math:: y_c = x_c + \gamma_c \, \frac{\lVert x_c \rVert_2}{\frac1C \sum_j \lVert x_j \rVert_2 + \epsilon} \, x_c
              + \beta_c

    where the norms run over all positions of a channel. Both parameters start at zero: the identity.

    Args:
        channels: channels C.
        eps: :math:`\epsilon`.
        channels_last: the channels are the last axis instead of the second.
        device, dtype: of the parameters.

    Shapes:
        - input and output: :math:`(N, C, *)`, or :math:`(N, *, C)` with `channels_last`

    Raises:
        ValueError: if `channels` is not positive.
    """

    def __init__(
        self, channels: int, eps: float = 1e-6, *, channels_last: bool = False, device=None, dtype=None
    ) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels must be positive: got {channels}")
        self.eps, self.channels_last = eps, channels_last
        self.weight = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as the identity."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Scale every channel of `x` by its energy relative to the others."""
        return global_response_norm(x, self.weight, self.bias, eps=self.eps, channels_last=self.channels_last)

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"{len(self.weight)}, eps={self.eps}, channels_last={self.channels_last}"


CASES = (
    Case(
        GlobalResponseNorm,
        {"channels": 6},
        inputs=((2, 6, 7, 5),),
        output=(2, 6, 7, 5),
        minimal=(1, 6, 1, 1),
        raises=(Raises(ValueError, "channels must be positive: got 0", {"channels": 0}),),
    ),
    Case(
        GlobalResponseNorm,
        {"channels": 6, "channels_last": True},
        inputs=((2, 7, 5, 6),),
        output=(2, 7, 5, 6),
        id="channels_last",
        vary=(0, 1, 2),
        minimal=(1, 1, 1, 6),
        channels_last=False,
    ),
)
