"""What a channel's rounded values cost in bits: a learned density of every channel, and real bytes of its integers.

Paper: Balle et al., Variational Image Compression with a Scale Hyperprior, https://arxiv.org/abs/1802.01436, appendix
6.1. The mass of an integer is computed from logarithms of sigmoids without cancellation, so no floor is needed under
it; values are rounded to integers, not to integers behind a learned median.
"""

import math
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.cases import Case, Raises
from omniconv.ops.range_coder import CodingTables, decode, encode, make_tables

__all__ = ["FactorizedPrior"]

_REACH = 128  # integers beyond it are coded as such


class FactorizedPrior(nn.Module):
    r"""`Fully factorised density <https://arxiv.org/abs/1802.01436>`_ of a latent; its output is what the latent costs.

    .. math:: b(\tilde y_c) = -\log_2 \bigl(F_c(\tilde y_c + \tfrac12) - F_c(\tilde y_c - \tfrac12)\bigr), \qquad
              F_c = \sigma \circ f_K \circ \dots \circ f_1

    .. math:: f_k(u) = v + \tanh(a_k) \odot \tanh(v), \quad v = \mathrm{softplus}(H_k)\, u + b_k

    (the last one without its tanh), which rises whatever the parameters. The latent is rounded to integers; in training
    uniform noise takes the place of rounding. Where the noisy values are wanted too, call `quantise` and `bits`.

    `update` turns the density into integer frequencies, which belong to the state; then `compress` gives bytes.

    Args:
        channels: channels C of the latent.
        filters: units of the inner steps of F.
        init_scale: how wide the density is at first, in units of the integers. A narrow one saves a short training the
            steps of narrowing it.
        device, dtype: of the parameters.

    Shapes:
        - input: :math:`(N, C, *)`
        - output: the same, in bits

    Raises:
        ValueError: if `channels` is not positive.
    """

    cdfs: Tensor
    sizes: Tensor
    lowest: Tensor

    def __init__(
        self,
        channels: int,
        filters: tuple[int, ...] = (3, 3, 3),
        init_scale: float = 10.0,
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels must be positive: got {channels}")
        self.channels, self.init_scale = channels, init_scale
        widths = (1, *filters, 1)
        self.matrices, self.biases, self.factors = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        for inner, outer in pairwise(widths):
            self.matrices.append(torch.empty(channels, outer, inner, device=device, dtype=dtype))
            self.biases.append(torch.empty(channels, outer, 1, device=device, dtype=dtype))
        for width in filters:
            self.factors.append(torch.empty(channels, width, 1, device=device, dtype=dtype))
        self.register_buffer("cdfs", torch.zeros(channels, 2 * _REACH + 3, dtype=torch.int32, device=device))
        self.register_buffer("sizes", torch.zeros(channels, dtype=torch.int32, device=device))
        self.register_buffer("lowest", torch.zeros(channels, dtype=torch.int32, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with a density of logistic shape, `init_scale` wide."""
        scale = self.init_scale ** (1 / len(self.matrices))
        for matrix, bias in zip(self.matrices, self.biases, strict=True):
            nn.init.constant_(matrix, math.log(math.expm1(1 / scale / matrix.shape[1])))
            nn.init.uniform_(bias, -0.5, 0.5)
        for factor in self.factors:
            nn.init.zeros_(factor)
        self.sizes.zero_()  # frequencies of another density would be read as its own

    def _logits(self, u: Tensor) -> Tensor:
        """Return the logits of F at `u`, (C, 1, M)."""
        for k, (matrix, bias) in enumerate(zip(self.matrices, self.biases, strict=True)):
            weight = F.softplus(matrix).to(u.dtype)
            v = bias.to(u.dtype) + weight[:, :, :1] * u[:, :1]
            # Sums of at most three terms: a batched product would be slower, and cast by autocast.
            for unit in range(1, matrix.shape[2]):
                v = torch.addcmul(v, weight[:, :, unit : unit + 1], u[:, unit : unit + 1])
            u = (
                v
                if k == len(self.factors)
                else torch.addcmul(v, self.factors[k].tanh().to(u.dtype), v.tanh())
            )
        return u

    def bits(self, y: Tensor) -> Tensor:
        """Return what each value of `y` (N, C, *), rounded or noisy, costs."""
        # Differences of sigmoids need more than the eleven bits of half precision.
        u = y.movedim(1, 0).to(torch.promote_types(y.dtype, torch.float32))
        flat = u.reshape(self.channels, 1, -1)
        below, above = self._logits(flat - 0.5), self._logits(flat + 0.5)
        # The difference of two sigmoids is the first, times one minus the second, times 1 - e^(below - above).
        log = F.logsigmoid(above) + F.logsigmoid(-below) + torch.log(-torch.expm1(below - above))
        return (log / -math.log(2)).reshape(u.shape).movedim(0, 1).to(y.dtype)

    def quantise(self, y: Tensor) -> Tensor:
        """Return `y` with uniform noise in [-1/2, 1/2) in training, and rounded otherwise."""
        # `rand_like` would draw in the order of the strides.
        return y + (torch.rand(y.shape, dtype=y.dtype, device=y.device) - 0.5) if self.training else y.round()

    def forward(self, y: Tensor) -> Tensor:
        """Return the bits of `y`, quantised."""
        return self.bits(self.quantise(y))

    @torch.no_grad()
    def update(self) -> None:
        """Renew the integer frequencies; call it when the density has been trained."""
        grid = torch.arange(-_REACH, _REACH + 1, dtype=torch.float64, device=self.cdfs.device)
        mass = torch.exp2(-self.bits(grid.expand(1, self.channels, -1)))[0]
        tables = make_tables(mass.cpu().numpy(), -_REACH)
        for name in ("cdfs", "sizes", "lowest"):
            self.get_buffer(name).copy_(torch.from_numpy(getattr(tables, name)))

    def _tables(self) -> CodingTables:
        if not bool(self.sizes.all()):
            raise ValueError("there are no frequencies to code with yet: call update() after training")
        return CodingTables(*(b.cpu().numpy() for b in (self.cdfs, self.sizes, self.lowest)))

    def compress(self, y: Tensor) -> list[bytes]:
        """Return the bytes of each sample of `y` (N, C, *), rounded.

        Raises:
            ValueError: if `update` has not been called, or a value is not finite or beyond 32 bits.
        """
        tables = self._tables()
        if not bool(y.isfinite().all()):
            raise ValueError("a latent must be finite to be coded: mind the learning rate of its encoder")
        numbers = y.round().clamp(-(2.0**40), 2.0**40).to(torch.int64).flatten(1).cpu().numpy()
        rows = np.repeat(np.arange(self.channels), numbers.shape[1] // self.channels)
        return [encode(sample, rows, tables) for sample in numbers]

    def decompress(self, messages: list[bytes], shape: tuple[int, ...]) -> Tensor:
        """Return the samples (N, C, *) of messages of `compress`, whose positions * have this shape."""
        tables = self._tables()
        rows = np.repeat(np.arange(self.channels), math.prod(shape))
        numbers = np.stack([decode(message, rows, tables) for message in messages])
        y = torch.from_numpy(numbers).reshape(len(messages), self.channels, *shape)
        return y.to(self.biases[0])


CASES = (
    Case(
        FactorizedPrior,
        {"channels": 6},
        inputs=((2, 6, 7, 5),),
        output=(2, 6, 7, 5),
        minimal=(1, 6, 1, 1),
        channels_last=False,
        raises=(Raises(ValueError, "channels must be positive: got 0", {"channels": 0}),),
    ),
)
