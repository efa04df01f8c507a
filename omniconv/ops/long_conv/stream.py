"""Long causal convolutions block by block, as the signal arrives."""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["LongConvStream"]


class LongConvStream:
    r"""Causal `omniconv.ops.long_conv` of a signal that comes in blocks: uniformly partitioned overlap-save.

    The kernel is cut into parts as long as a block. A block is transformed once, together with the one before it,
    and its spectrum is kept for as many steps as there are parts,

    .. math:: Y_t = \sum_p K_p X_{t - p}

    so that one block costs O(B log B + K) and its output is there as soon as it is. Without gradients.

    Args:
        kernel: of any length K.
        skip: one weight a channel for the input itself.
        block: B, samples that come at a time.

    Shapes:
        - kernel: :math:`(C, K)`
        - skip: :math:`(C)`
        - a call's input and output: :math:`(N, C, B)`

    Raises:
        ValueError: if `block` is not positive, or a call's input is not (N, C, B) with the N of the first one.
    """

    def __init__(self, kernel: Tensor, skip: Tensor | None = None, *, block: int) -> None:
        if block < 1:
            raise ValueError(f"block must be positive: got {block}")
        self.block = block
        self.skip = skip
        wide = kernel.detach().to(torch.promote_types(kernel.dtype, torch.float32))
        parts = F.pad(wide, (0, -kernel.shape[1] % block)).unflatten(1, (-1, block))
        self._spectra = torch.fft.rfft(parts, 2 * block)
        self.reset()

    def reset(self) -> None:
        """Forget the signal so far."""
        self._state: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Return the output of the next block."""
        c, parts, half = self._spectra.shape
        n = x.shape[0] if self._state is None else self._state[0].shape[0]
        if x.shape != (n, c, self.block):
            raise ValueError(f"x must be {(n, c, self.block)}, one block a call: got {tuple(x.shape)}")
        wide = x.to(self._spectra.real.dtype)
        fresh = torch.zeros_like(wide), self._spectra.new_zeros(n, c, parts, half)
        last, past = self._state or fresh
        now = torch.fft.rfft(torch.cat([last, wide], 2))
        past = torch.cat([now.unsqueeze(2), past[:, :, :-1]], 2)
        self._state = wide, past
        y = torch.fft.irfft((self._spectra * past).sum(2), 2 * self.block)[..., self.block :]
        return (y if self.skip is None else y + self.skip[:, None] * wide).to(x.dtype)
