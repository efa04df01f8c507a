"""Functions on a box of whole numbers, as tensors: convolution by torch's kernels where there is one.

Paper: Elliott, https://arxiv.org/abs/1903.10677, whose fast form for such keys this is.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from omniconv.ops.algebra.semirings import PROBABILITY, REAL, Semiring

__all__ = ["Array", "convolve"]

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def convolve(a: Tensor, b: Tensor, semiring: Semiring = REAL) -> Tensor:
    r"""Convolve two arrays over a semiring, whole: the product of polynomials, or of images with kernels.

    .. math:: y_w = \bigoplus_{u + v = w} a_u \otimes b_v

    Real numbers go through torch's convolutions; for other semirings all windows of one array meet the other array at
    once. Gradients pass wherever the semiring's operations have them.

    Args:
        a: values at 0, 1, ... along every axis.
        b: values, of as many axes.
        semiring: commutative, with a `reduce`.

    Shapes:
        - a: :math:`(*S)`
        - b: :math:`(*K)`
        - output: :math:`(*S + K - 1)`

    Raises:
        ValueError: if the axes differ in number, or the semiring's values are not for tensors.
    """
    if a.ndim != b.ndim or a.ndim == 0:
        raise ValueError(f"a and b must have the same one or more axes: got {a.ndim} and {b.ndim}")
    if semiring.reduce is None:
        raise ValueError(f"values of {semiring} cannot be elements of tensors")
    if a.numel() < b.numel():
        a, b = b, a
    sides = [side for size in reversed(b.shape) for side in (size - 1, size - 1)]
    flipped = b.flip(tuple(range(b.ndim)))
    if semiring in (REAL, PROBABILITY) and a.is_floating_point() and a.ndim in _CONV:
        padding = tuple(size - 1 for size in b.shape)
        return _CONV[a.ndim](a[None, None], flipped[None, None], padding=padding)[0, 0]
    windows = F.pad(a, sides, value=semiring.zero)
    for axis, size in enumerate(b.shape):
        windows = windows.unfold(axis, size, 1)
    return semiring.reduce(semiring.multiply(windows, flipped).flatten(a.ndim))


class Array:
    """A function of naturals, or of tuples of them, that is zero outside a box.

    Args:
        semiring: of the values.
        values: a tensor; its place 0 in every axis is the key 0.
    """

    def __init__(self, semiring: Semiring, values: Tensor) -> None:
        self.semiring, self.values = semiring, values

    def __getitem__(self, key: int | tuple[int, ...]) -> Tensor:
        place = (key,) if isinstance(key, int) else key
        inside = all(0 <= i < size for i, size in zip(place, self.values.shape, strict=True))
        return self.values[place] if inside else self.values.new_tensor(self.semiring.zero)

    def __add__(self, other: "Array") -> "Array":
        assert self.semiring.reduce is not None
        shape = [max(sizes) for sizes in zip(self.values.shape, other.values.shape, strict=True)]
        both = [self._grown(shape), other._grown(shape)]
        total = self.semiring.reduce(torch.stack(both, -1))
        return Array(self.semiring, total)

    def _grown(self, shape: list[int]) -> Tensor:
        sides = [
            side
            for size, old in zip(reversed(shape), reversed(self.values.shape), strict=True)
            for side in (0, size - old)
        ]
        return F.pad(self.values, sides, value=self.semiring.zero)

    def __mul__(self, other: "Array") -> "Array":
        return Array(self.semiring, convolve(self.values, other.values, self.semiring))
