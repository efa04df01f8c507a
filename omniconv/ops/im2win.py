"""Lowering by windows, from `Im2win <https://arxiv.org/abs/2306.14316>`_.

im2col copies every window of a map, so that a pixel stands in the lowered map once for every tap of the kernel. Here
it stands there once for every row of the kernel: the rows that an output row needs are interleaved column by column,
and windows that are neighbours overlap in memory as they do in the map.
"""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

__all__ = ["im2win", "windows"]


def im2win(x: Tensor, height: int, *, stride: int = 1, padding: int | Sequence[int] = 0) -> Tensor:
    r"""Interleave the rows that every output row of a convolution needs, from `Im2win
    <https://arxiv.org/abs/2306.14316>`_.

    .. math:: \hat x_{n, c, i, j K + u} = x_{n, c, s i + u, j}

    Args:
        x: the maps. Those in channels-last format are lowered in that format.
        height: K, rows of the kernel.
        stride: s, rows from one output to the next.
        padding: zeros on both sides, one number or one for rows and one for columns.

    Shapes:
        - x: :math:`(N, C, H, W)`
        - output: :math:`(N, C, H', K W)` with :math:`H' = \lfloor (H - K) / s \rfloor + 1`, H and W padded

    Raises:
        ValueError: if a window is higher than the padded map.
    """
    rows, columns = (padding, padding) if isinstance(padding, int) else padding
    x = F.pad(x, (columns, columns, rows, rows)) if rows or columns else x
    if x.shape[2] < height:
        raise ValueError(f"height must be at most the padded map's {x.shape[2]} rows: got {height}")
    # A map in channels-last format stays in it: the copy that `flatten` makes keeps the order of memory.
    last = x.permute(0, 2, 3, 1)
    if last.is_contiguous() and not x.is_contiguous():
        return last.unfold(1, height, stride).movedim(4, 3).flatten(2, 3).permute(0, 3, 1, 2)
    return x.unfold(2, height, stride).flatten(3)


def windows(lowered: Tensor, kernel_size: tuple[int, int], *, stride: int = 1) -> Tensor:
    r"""Return the windows of a lowered map, as a view.

    .. math:: y_{n, c, i, j, v K + u} = \hat x_{n, c, i, (s j + v) K + u}

    Args:
        lowered: what `im2win` returned.
        kernel_size: rows K and columns of the kernel; the rows must be those that the map was lowered for.
        stride: s, columns from one output to the next.

    Shapes:
        - lowered: :math:`(N, C, H', K W)`
        - output: :math:`(N, C, H', W', K L)` for L columns, with :math:`W' = \lfloor (W - L) / s \rfloor + 1`
    """
    height, width = kernel_size
    return lowered.unfold(3, height * width, stride * height)
