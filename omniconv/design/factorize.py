"""What it saves to replace a kernel by smaller ones that see as much.

Paper: Szegedy et al., Rethinking the Inception Architecture for Computer Vision, https://arxiv.org/abs/1512.00567,
section 3.
"""

from math import prod

__all__ = ["factorization_saving"]

Window = tuple[int, int]


def factorization_saving(kernel: Window, parts: list[Window]) -> float:
    r"""Return the share of weights and multiply-adds saved by a stack, `Inception-v3 <https://arxiv.org/abs/1512.00567>`_.

    .. math:: 1 - \sum_i h_i w_i / (h w)

    for layers of stride 1 between which the number of channels does not change. Two 3x3 kernels in place of a 5x5
    save 28%, a 3x1 and a 1x3 in place of a 3x3 33%, a 1xn and an nx1 in place of an nxn :math:`1 - 2 / n`.

    Args:
        kernel: (height, width) of the kernel to replace.
        parts: (height, width) of those in its place, one after another.

    Raises:
        ValueError: if the stack does not see as many pixels as the kernel.
    """
    seen = tuple(1 + sum(part[axis] - 1 for part in parts) for axis in (0, 1))
    if seen != tuple(kernel):
        raise ValueError(
            f"parts must see as much as the kernel: got {seen} pixels instead of {tuple(kernel)}"
        )
    return 1 - sum(prod(part) for part in parts) / prod(kernel)
