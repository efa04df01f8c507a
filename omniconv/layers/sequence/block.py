"""The residual block in which a long sequence layer stands: mixing over time, then over channels."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.cases import Case

__all__ = ["GatedBlock"]


class GatedBlock(nn.Module):
    r"""Post-norm block of `S4 <https://arxiv.org/abs/2111.00396>`_ around any layer that mixes every channel over time.

    .. math:: y = \mathrm{LN}\bigl(x + \mathrm{GLU}(W \, \mathrm{GELU}(f(x)) + b)\bigr)

    where f is the inner layer, W doubles the channels, one half of which gates the other, and LN normalises the
    channels of every time step. The block is causal where f is.

    Args:
        inner: makes f, a layer from (N, C, L) to (N, C, L); called with device and dtype.
        channels: C.
        dropout: share of channels that are zeroed for the whole sequence, after GELU and after GLU.
        device, dtype: of the parameters.

    Shapes:
        - input and output: :math:`(N, C, L)`
    """

    def __init__(
        self, inner: Callable[..., nn.Module], channels: int, dropout: float = 0.0, *, device=None, dtype=None
    ) -> None:
        super().__init__()
        self.inner = inner(device=device, dtype=dtype)
        self.mix = nn.Conv1d(channels, 2 * channels, 1, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(channels, device=device, dtype=dtype)
        self.dropout = nn.Dropout1d(dropout)

    def reset_parameters(self) -> None:
        """Draw new weights, those of the inner layer as well."""
        for module in (self.inner, self.mix, self.norm):
            module.reset_parameters()  # pyright: ignore[reportCallIssue]

    def forward(self, x: Tensor) -> Tensor:
        """Mix over time, then over channels."""
        y = self.dropout(F.gelu(self.inner(x)))
        y = x + self.dropout(F.glu(self.mix(y), dim=1))
        return self.norm(y.transpose(1, 2)).transpose(1, 2)


CASES = (
    Case(
        GatedBlock,
        {"inner": partial(nn.Conv1d, 5, 5, 3, padding=1), "channels": 5, "dropout": 0.1},
        inputs=((2, 5, 11),),
        output=(2, 5, 11),
        vary=(0, 2),
        minimal=(1, 5, 1),
    ),
)
