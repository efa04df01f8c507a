"""What a filter is worth in states: its Hankel matrix, and recurrences that are read off it.

Row i of a filter's Hankel matrix is what the future hears of an impulse i steps ago; its rank is the number of states
that a recurrence needs. Both truncations here need no training.
"""

import torch
from torch import Tensor

from omniconv.compress.factor.recurrence import Recurrence, block_powers

__all__ = [
    "balanced_truncation", "distillation_order", "fit_residues", "hankel_matrix", "hankel_singular_values",
    "modal_truncation",
]  # fmt: skip

# Poles are kept this far inside the unit circle, so that a recurrence may run for ever.
_MARGIN = 1e-6


def hankel_matrix(kernel: Tensor) -> Tensor:
    r"""Return the square Hankel matrix :math:`H_{ij} = h_{i+j+1}`, as large as the taps allow.

    Args:
        kernel: (*, L), from tap 0, which is not part of it.

    Returns:
        (*, m, m) with m = L // 2.
    """
    size = kernel.shape[-1] // 2
    return kernel[..., 1 : 2 * size].unfold(-1, size, 1)


def _leading_vectors(kernel: Tensor, count: int) -> Tensor:
    """Return the left singular vectors (C, m, count) of the largest singular values of the Hankel matrices."""
    found = []
    # One channel at a time saves memory. The matrix is symmetric: its singular values are absolute eigenvalues.
    for taps in kernel:
        values, vectors = torch.linalg.eigh(hankel_matrix(taps))
        found.append(vectors[:, values.abs().topk(count).indices])
    return torch.stack(found)


def hankel_singular_values(kernel: Tensor) -> Tensor:
    r"""Return the Hankel singular values :math:`\sigma_1 \ge \sigma_2 \ge \dots` of every filter.

    No recurrence of d states comes closer to the filter, in the largest singular value of the difference of both
    Hankel matrices, than :math:`\sigma_{d+1}` (Adamyan, Arov and Krein).

    Args:
        kernel: (C, L).

    Returns:
        (C, L // 2), float64.
    """
    values = torch.stack([torch.linalg.eigvalsh(hankel_matrix(taps)) for taps in kernel.double()])
    return values.abs().sort(1, descending=True).values


def distillation_order(kernel: Tensor, tolerance: float = 1e-2) -> int:
    r"""Return the least even order d with :math:`\sigma_{d+1} \le \epsilon\, \sigma_1` in every channel.

    Args:
        kernel: (C, L).
        tolerance: :math:`\epsilon`.
    """
    values = hankel_singular_values(kernel)
    states = int((values > tolerance * values[:, :1]).sum(1).max())
    return max(2, states + states % 2)


def fit_residues(center: Tensor, spread: Tensor, kernel: Tensor) -> Tensor:
    """Return the residues (C, d / 2, 2) with which blocks come closest to kernels (C, L) in the sum of squares."""
    basis = block_powers(center, spread, kernel.shape[1] - 1).permute(1, 3, 2, 0).flatten(2)
    # By singular values, as equal poles make equal columns; of unit length, as they differ by orders of magnitude.
    length = basis.norm(dim=1, keepdim=True)
    solution = torch.linalg.lstsq(basis / length, kernel[:, 1:, None], driver="gelsd").solution
    return (solution[..., 0] / length[:, 0]).unflatten(1, (-1, 2))


def _blocks(poles: Tensor) -> tuple[Tensor, Tensor]:
    """Return a and q (d / 2) of blocks that have the poles (d), which are real or in conjugate pairs."""
    poles = poles * ((1 - _MARGIN) / poles.abs().clamp_min(1 - _MARGIN))
    upper = poles[poles.imag > 0]
    real = poles[poles.imag == 0].real.sort(descending=True).values
    first, second = real[0::2], real[1::2]
    center = torch.cat([upper.real, (first + second) / 2])
    return center, torch.cat([-upper.imag.square(), ((first - second) / 2).square()])


def balanced_truncation(kernel: Tensor, order: int) -> Recurrence:
    """Return the recurrence whose poles are those of the filter's `order` strongest balanced states.

    The poles are read off the leading singular vectors of the Hankel matrix, which a shift by one step must map to
    each other (Ho and Kalman; Kung); residues then have the least squares error over all taps.

    Args:
        kernel: (C, L).
        order: states d of a channel, even, less than L // 2.

    Raises:
        ValueError: if `order` is odd or out of range.
    """
    size = kernel.shape[1] // 2
    if order < 2 or order % 2 or order >= size:
        raise ValueError(
            f"order must be even and from 2 to {size - 1} for {kernel.shape[1]} taps: got {order}"
        )
    taps = kernel.detach().double().cpu()
    vectors = _leading_vectors(taps, order)
    shift = torch.linalg.lstsq(vectors[:, :-1], vectors[:, 1:]).solution
    blocks = [_blocks(poles) for poles in torch.linalg.eigvals(shift)]
    center, spread = (torch.stack(part) for part in zip(*blocks, strict=True))
    residues = fit_residues(center, spread, taps)
    return Recurrence(*(t.to(kernel) for t in (center, spread, residues, kernel[:, 0])))


@torch.no_grad()
def modal_truncation(recurrence: Recurrence, order: int, length: int) -> Recurrence:
    """Return the recurrence of the blocks that are loudest over `length` taps, each unchanged.

    Args:
        recurrence: of more states.
        order: states to keep, even.
        length: taps over which responses are compared.
    """
    if order < 2 or order % 2 or order > recurrence.order:
        raise ValueError(f"order must be even and from 2 to {recurrence.order}: got {order}")
    powers = block_powers(recurrence.center, recurrence.spread, length)
    loudness = torch.einsum("pcnl,cnp->cnl", powers, recurrence.residues).norm(dim=2)
    kept = loudness.topk(order // 2, 1).indices
    residues = recurrence.residues.gather(1, kept[..., None].expand(-1, -1, 2))
    center, spread = (part.gather(1, kept) for part in (recurrence.center, recurrence.spread))
    return Recurrence(center, spread, residues, recurrence.direct)
