"""Sparse convolution as its equation reads: gather, multiply and add, tap by tap."""

from torch import Tensor

__all__ = ["reference"]


def reference(x: Tensor, weight: Tensor, neighbours: Tensor) -> Tensor:
    r"""Return the convolution of a prepared call.

    .. math:: y_q = \sum_{u:\ \nu_{qu} \ge 0} W_u\, x_{\nu_{qu}}
    """
    y = x.new_zeros(neighbours.shape[0], weight.shape[0])
    for tap, matrix in enumerate(weight.flatten(2).unbind(2)):
        rows = (neighbours[:, tap] >= 0).nonzero()[:, 0]
        y = y.index_add(0, rows, x[neighbours[rows, tap]] @ matrix.T)
    return y
