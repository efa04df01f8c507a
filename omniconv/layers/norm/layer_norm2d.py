"""Layer normalisation over the channels of every pixel, for (N, C, H, W) maps.

Papers: Ba et al., Layer Normalization, https://arxiv.org/abs/1607.06450; used in place of batch norm by
ConvNeXt, Liu et al., https://arxiv.org/abs/2201.03545.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.cases import Case, Raises

__all__ = ["LayerNorm2d"]


class LayerNorm2d(nn.LayerNorm):
    r"""`Layer normalization <https://arxiv.org/abs/1607.06450>`_ of each pixel over its channels.

    .. math:: y_{chw} = \gamma_c \frac{x_{chw} - \mu_{hw}}{\sqrt{\sigma^2_{hw} + \epsilon}} + \beta_c

    The norm is computed on a channels-last view, so a channels-last input is neither copied nor changed in
    layout; any other input gives a channels-last output.

    Args:
        num_channels: channels C.
        eps: :math:`\epsilon`.
        affine: learn :math:`\gamma` and :math:`\beta`.
        device, dtype: of the parameters.

    Shapes:
        - input and output: :math:`(N, C, H, W)`

    Raises:
        ValueError: if `num_channels` is not positive.
    """

    def __init__(
        self, num_channels: int, eps: float = 1e-6, affine: bool = True, *, device=None, dtype=None
    ) -> None:
        if num_channels < 1:
            raise ValueError(f"num_channels must be positive: got {num_channels}")
        super().__init__(num_channels, eps=eps, elementwise_affine=affine, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise every pixel of `input`."""
        x = input.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


CASES = (
    Case(
        LayerNorm2d,
        {"num_channels": 6},
        inputs=((2, 6, 7, 5),),
        output=(2, 6, 7, 5),
        minimal=(1, 6, 1, 1),
        raises=(Raises(ValueError, "num_channels must be positive: got 0", {"num_channels": 0}),),
    ),
    Case(
        LayerNorm2d,
        {"num_channels": 5, "affine": False},
        inputs=((2, 5, 3, 4),),
        output=(2, 5, 3, 4),
        id="plain",
        minimal=(1, 5, 1, 1),
    ),
)
