"""The Haar wavelet transform of maps, one level at a time, and its inverse.

A. Haar, Zur Theorie der orthogonalen Funktionensysteme, 1910. Bands, signs and the zero that a map of odd size gets
at its end are those of PyWavelets (`dwt2(x, "haar", mode="zero")`).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["haar_dwt2d", "haar_idwt2d"]


def haar_dwt2d(x: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return the approximation and the horizontal, vertical and diagonal details of maps, at half their size.

    .. math:: \begin{pmatrix} A & V \\ H & D \end{pmatrix}
              = \frac12 \begin{pmatrix} 1 & 1 \\ 1 & -1 \end{pmatrix}
                \begin{pmatrix} x_{2i,2j} & x_{2i,2j+1} \\ x_{2i+1,2j} & x_{2i+1,2j+1} \end{pmatrix}
                \begin{pmatrix} 1 & 1 \\ 1 & -1 \end{pmatrix}

    The transform is orthogonal: the sum of squares stays. An odd size gets a zero at its end.

    Args:
        x: the maps.

    Shapes:
        - x: :math:`(*, H, W)`
        - output: :math:`(*, \lceil H / 2 \rceil, \lceil W / 2 \rceil)` and
          :math:`(*, 3, \lceil H / 2 \rceil, \lceil W / 2 \rceil)`
    """
    x = F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2)) / 2
    upper, lower = x[..., ::2, :], x[..., 1::2, :]
    both, difference = upper + lower, upper - lower
    low = both[..., ::2] + both[..., 1::2]
    high = torch.stack(
        (
            difference[..., ::2] + difference[..., 1::2],
            both[..., ::2] - both[..., 1::2],
            difference[..., ::2] - difference[..., 1::2],
        ),
        -3,
    )
    return low, high


def haar_idwt2d(low: Tensor, high: Tensor) -> Tensor:
    r"""Return the maps whose `haar_dwt2d` is given; of a map of odd size, with the zero at its end.

    Args:
        low: the approximation.
        high: the three details.

    Shapes:
        - low: :math:`(*, h, w)`
        - high: :math:`(*, 3, h, w)`
        - output: :math:`(*, 2 h, 2 w)`
    """
    horizontal, vertical, diagonal = high.unbind(-3)
    both = torch.stack((low + vertical, low - vertical), -1).flatten(-2)
    difference = torch.stack((horizontal + diagonal, horizontal - diagonal), -1).flatten(-2)
    return torch.stack((both + difference, both - difference), -2).flatten(-3, -2) / 2
