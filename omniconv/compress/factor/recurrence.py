"""Convolution by a recurrence: a causal filter of any length as a few states that every step updates.

The states are those of real second-order blocks, so that arithmetic is real, and a block may have a pair of conjugate
poles or two real ones.
"""

import torch
from torch import Tensor, nn

from omniconv.ops.long_conv.api import long_conv

__all__ = ["Recurrence", "block_powers"]


def block_powers(center: Tensor, spread: Tensor, length: int) -> Tensor:
    r"""Return :math:`A^0 e_1, \dots, A^{L-1} e_1` of blocks :math:`A = [[a, q], [1, a]]`.

    With :math:`s^2 = q` a block multiplies numbers u + v s by a + s, so that powers are found by squaring, without a
    loop over time.

    Args:
        center: a, any shape S.
        spread: q, shape S.
        length: L.

    Returns:
        (2, *S, L): u and v of every power.
    """
    u, v = torch.ones_like(center)[..., None], torch.zeros_like(center)[..., None]
    q, (pu, pv) = spread[..., None], (center[..., None], torch.ones_like(u))
    while u.shape[-1] < length:
        u, v = torch.cat([u, pu * u + q * pv * v], -1), torch.cat([v, pu * v + pv * u], -1)
        pu, pv = pu * pu + q * pv * pv, 2 * pu * pv
    return torch.stack([u[..., :length], v[..., :length]])


class Recurrence(nn.Module):
    r"""A causal filter of every channel, as a convolution or step by step (`Laughing Hyena <https://arxiv.org/abs/2310.18780>`_).

    .. math:: y_t = h_0 x_t + \sum_n r_n^\top s_{n,t}, \qquad
              s_{n,t+1} = \begin{pmatrix} a_n & q_n \\ 1 & a_n \end{pmatrix} s_{n,t}
                        + \begin{pmatrix} 1 \\ 0 \end{pmatrix} x_t

    Block n has the poles :math:`a_n \pm \sqrt{q_n}`, conjugate where :math:`q_n < 0`. A step costs O(d) a channel,
    however much came before.

    Args:
        center: a.
        spread: q.
        residues: r.
        direct: :math:`h_0`.

    Shapes:
        - center, spread: :math:`(C, d / 2)`
        - residues: :math:`(C, d / 2, 2)`
        - direct: :math:`(C)`
        - input and output: :math:`(N, C, L)`; of a step :math:`(N, C)`
        - state: :math:`(N, C, d / 2, 2)`
    """

    def __init__(self, center: Tensor, spread: Tensor, residues: Tensor, direct: Tensor) -> None:
        super().__init__()
        self.center, self.spread = nn.Parameter(center.clone()), nn.Parameter(spread.clone())
        self.residues, self.direct = nn.Parameter(residues.clone()), nn.Parameter(direct.clone())

    @property
    def order(self) -> int:
        """States d of a channel."""
        return 2 * self.center.shape[1]

    def poles(self) -> Tensor:
        """Return all poles (C, d), complex."""
        root = torch.complex(self.spread, torch.zeros_like(self.spread)).sqrt()
        return torch.cat([self.center + root, self.center - root], 1)

    def kernel(self, length: int) -> Tensor:
        """Return the first taps (C, length)."""
        powers = block_powers(self.center, self.spread, length - 1)
        tail = torch.einsum("pcnl,cnp->cl", powers, self.residues)
        return torch.cat([self.direct[:, None], tail], 1)

    def forward(self, x: Tensor) -> Tensor:
        """Filter whole sequences, by a long convolution."""
        return long_conv(x, self.kernel(x.shape[2]))

    def initial_state(self, batch: int) -> Tensor:
        """Return the state before the first step, zeros."""
        return self.residues.new_zeros(batch, *self.residues.shape)

    def prefill(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Filter whole sequences and return the state after their last step as well."""
        powers = block_powers(self.center, self.spread, x.shape[2])
        return self(x), torch.einsum("pcnl,bcl->bcnp", powers, x.flip(2))

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output of the next step and the state after it."""
        u, v = state.unbind(-1)
        y = self.direct * x + torch.einsum("bcnp,cnp->bc", state, self.residues)
        ahead = self.center * u + self.spread * v + x[..., None], u + self.center * v
        return y, torch.stack(ahead, -1)
