r"""Which weight couples what, and the bijection between weights of the two forms.

Input degree :math:`l` and output degree :math:`k` are coupled by :math:`2 \min(l, k) + 1` numbers in either form. In
the frame of the edge, these belong to the orders :math:`m = -\min, \dots, \min`: :math:`m \ge 0` keeps the order, and
:math:`m < 0` mixes m with -m. In the tensor product, they belong to the filter degrees
:math:`f = |l - k|, \dots, l + k`. Along the polar axis only order 0 of the filter is not zero, so

.. math:: w_m = \sum_f \sqrt{(2 f + 1) / 4 \pi}\; C^{l f k}_{|m|, 0, m}\, h_f

where odd :math:`l + f + k` gives :math:`m < 0` alone, and even ones :math:`m \ge 0`.
"""

import functools
import math

import numpy as np
import torch
from torch import Tensor

from omniconv.ops.clebsch_gordan import clebsch_gordan

__all__ = ["from_paths", "to_paths", "weight_count", "weight_rows"]


def weight_rows(degree: int, order: int) -> dict[tuple[int, int], tuple[int, int]]:
    """Return (k, l) -> (row of the weight for m = 0, highest m); output degrees k run slowest.

    Args:
        degree: L, highest degree of input and output.
        order: M, highest order; those above have no weights.
    """
    rows, at = {}, 0
    for k in range(degree + 1):
        for n in range(degree + 1):
            most = min(k, n, order)
            rows[k, n] = (at + most, most)
            at += 2 * most + 1
    return rows


def weight_count(degree: int, order: int) -> int:
    """Return how many weights couple every pair of channels.

    Args:
        degree: L, highest degree of input and output.
        order: M, highest order.
    """
    return sum(2 * most + 1 for _, most in weight_rows(degree, order).values())


@functools.cache
def _mixing(k: int, n: int) -> np.ndarray:
    """Return the matrix that makes weights of the orders of weights of the filter degrees, for one pair of degrees."""
    least = min(k, n)
    matrix = np.zeros((2 * least + 1, 2 * least + 1))
    for column, f in enumerate(range(abs(k - n), k + n + 1)):
        coupling = math.sqrt((2 * f + 1) / (4 * math.pi)) * clebsch_gordan(n, f, k)[:, f]
        for m in range(-least, least + 1):
            # For m < 0: what order |m| of the input gives to order -|m| of the output.
            matrix[m + least, column] = coupling[n + abs(m), k + m]
    return matrix


def from_paths(paths: Tensor, degree: int) -> Tensor:
    """Return the weights of the SO(2) form that do what path weights of the full tensor product do.

    Args:
        paths: (T, C', C), for every pair of degrees, in the order of the weights, one for each filter degree.
        degree: L.
    """
    return _apply(paths, degree, _mixing)


def to_paths(weight: Tensor, degree: int) -> Tensor:
    """Return the path weights of the full tensor product that do what the weights of the SO(2) form do.

    Args:
        weight: (T, C', C) with all orders.
        degree: L.
    """
    return _apply(weight, degree, lambda k, n: np.linalg.inv(_mixing(k, n)))


def _apply(weight: Tensor, degree: int, matrix) -> Tensor:
    parts = []
    for (k, n), (at, most) in weight_rows(degree, degree).items():
        mixing = torch.from_numpy(matrix(k, n)).to(weight)
        parts.append(torch.einsum("mf,foi->moi", mixing, weight[at - most : at + most + 1]))
    return torch.cat(parts)


def pad_orders(weight: Tensor, degree: int, order: int) -> Tensor:
    """Return weights with all orders, zero above `order`."""
    parts = []
    for (k, n), (at, most) in weight_rows(degree, order).items():
        missing = min(k, n) - most
        part = weight[at - most : at + most + 1]
        zeros = part.new_zeros(missing, *part.shape[1:])
        parts.append(torch.cat([zeros, part, zeros]))
    return torch.cat(parts)
