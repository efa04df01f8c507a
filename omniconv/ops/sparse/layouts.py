"""Layouts of `STen <https://arxiv.org/abs/2304.07613>`_: masks, lists of entries, blocks and patterns.

Those of matrices take a weight `(O, C, *K)` as the matrix (O, C K) that it multiplies with.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from omniconv.ops.sparse import grouped_nm
from omniconv.ops.sparse.base import Layout

__all__ = ["COO", "CSR", "NM", "Block", "GroupedNM", "Masked"]


def _matrix(dense: Tensor) -> Tensor:
    """Return a weight as the matrix it multiplies with: one row for every output."""
    return dense.reshape(dense.shape[0], -1)


def _pad(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """Pad a matrix with zeros to multiples of sizes."""
    return F.pad(matrix, (0, -matrix.shape[1] % columns, 0, -matrix.shape[0] % rows))


def _crop(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    return matrix[: shape[0], : math.prod(shape[1:])].reshape(shape)


@dataclass(frozen=True, eq=False)
class Masked(Layout):
    """The whole tensor with zeros where the mask says so."""

    values: Tensor
    kept: Tensor
    shape: torch.Size

    @classmethod
    def from_mask(cls, dense: Tensor, mask: Tensor) -> Self:
        """Keep the entries under a mask."""
        return cls(torch.where(mask, dense, 0), mask, dense.shape)

    def dense(self) -> Tensor:
        """Return the whole tensor, zeros included."""
        return torch.where(self.kept, self.values, 0)

    def take(self, dense: Tensor) -> Tensor:
        """Return the entries of another tensor that stand where this one keeps its own, as values."""
        return torch.where(self.kept, dense, 0)


@dataclass(frozen=True, eq=False)
class COO(Layout):
    """Every entry with its coordinates: values (n), indices (axes, n)."""

    values: Tensor
    indices: Tensor
    shape: torch.Size

    @classmethod
    def from_mask(cls, dense: Tensor, mask: Tensor) -> Self:
        """Keep the entries under a mask."""
        indices = mask.nonzero().T.contiguous()
        return cls(dense[tuple(indices)], indices, dense.shape)

    def dense(self) -> Tensor:
        """Return the whole tensor, zeros included."""
        return self.values.new_zeros(self.shape).index_put(tuple(self.indices), self.values)

    def take(self, dense: Tensor) -> Tensor:
        """Return the entries of another tensor that stand where this one keeps its own, as values."""
        return dense[tuple(self.indices)]


@dataclass(frozen=True, eq=False)
class CSR(Layout):
    """Row by row: values (n), their columns (n), and where each row begins (rows + 1)."""

    values: Tensor
    begins: Tensor
    columns: Tensor
    shape: torch.Size

    @classmethod
    def from_mask(cls, dense: Tensor, mask: Tensor) -> Self:
        """Keep the entries under a mask."""
        matrix, mask = _matrix(dense), _matrix(mask)
        begins = F.pad(mask.sum(1).cumsum(0), (1, 0))
        return cls(matrix[mask], begins, mask.nonzero()[:, 1].contiguous(), dense.shape)

    @property
    def rows(self) -> Tensor:
        """The row of every value."""
        rows = torch.arange(self.shape[0], device=self.device)
        return rows.repeat_interleave(self.begins.diff(), output_size=len(self.columns))

    def dense(self) -> Tensor:
        """Return the whole tensor, zeros included."""
        matrix = self.values.new_zeros(self.shape[0], math.prod(self.shape[1:]))
        return matrix.index_put((self.rows, self.columns), self.values).reshape(self.shape)

    def take(self, dense: Tensor) -> Tensor:
        """Return the entries of another tensor that stand where this one keeps its own, as values."""
        return _matrix(dense)[self.rows, self.columns]


@dataclass(frozen=True, eq=False)
class NM(Layout):
    """n of every m neighbours in a row: values and their places among the m, both (rows, blocks, n)."""

    values: Tensor
    places: Tensor
    m: int
    shape: torch.Size

    @classmethod
    def largest(cls, dense: Tensor, n: int, m: int) -> Self:
        """Keep the n largest magnitudes of every m neighbours."""
        blocks = _pad(_matrix(dense), 1, m).unflatten(1, (-1, m))
        places = blocks.detach().abs().topk(n, 2).indices.sort(2).values
        return cls(blocks.gather(2, places), places, m, dense.shape)

    def dense(self) -> Tensor:
        """Return the whole tensor, zeros included."""
        blocks = self.values.new_zeros(*self.values.shape[:2], self.m).scatter(2, self.places, self.values)
        return _crop(blocks.flatten(1), self.shape)

    def take(self, dense: Tensor) -> Tensor:
        """Return the entries of another tensor that stand where this one keeps its own, as values."""
        return _pad(_matrix(dense), 1, self.m).unflatten(1, (-1, self.m)).gather(2, self.places)


@dataclass(frozen=True, eq=False)
class Block(Layout):
    """Whole blocks: values (blocks, height, width), and in which row and column of blocks each stands (2, blocks)."""

    values: Tensor
    indices: Tensor
    shape: torch.Size

    @staticmethod
    def blocks(dense: Tensor, size: tuple[int, int]) -> Tensor:
        """Return a tensor, as a matrix, cut into blocks (rows, columns, height, width)."""
        matrix = _pad(_matrix(dense), *size)
        return matrix.unflatten(1, (-1, size[1])).unflatten(0, (-1, size[0])).transpose(1, 2)

    @classmethod
    def chosen(cls, dense: Tensor, size: tuple[int, int], kept: Tensor) -> Self:
        """Keep the blocks where `kept` (rows, columns) is True."""
        indices = kept.nonzero().T.contiguous()
        return cls(cls.blocks(dense, size)[tuple(indices)], indices, dense.shape)

    def dense(self) -> Tensor:
        """Return the whole tensor, zeros included."""
        height, width = self.values.shape[1:]
        grid = -(-self.shape[0] // height), -(-math.prod(self.shape[1:]) // width)
        blocks = self.values.new_zeros(*grid, height, width).index_put(tuple(self.indices), self.values)
        return _crop(blocks.transpose(1, 2).flatten(2).flatten(0, 1), self.shape)

    def take(self, dense: Tensor) -> Tensor:
        """Return the entries of another tensor that stand where this one keeps its own, as values."""
        height, width = self.values.shape[1:]
        return self.blocks(dense, (height, width))[tuple(self.indices)]


@dataclass(frozen=True, eq=False)
class GroupedNM(Layout):
    """n of every m neighbours, where g rows share a pattern and patterns come in a fixed order.

    In every chunk of rows and every m columns, each of the binomial(m, n) patterns is that of exactly g rows; so only
    the rows are stored, and `grouped_nm_matmul` knows the columns beforehand. Values are (chunks, blocks, patterns,
    g, n), rows (chunks, blocks, patterns, g) within their chunk.
    """

    values: Tensor
    rows: Tensor
    m: int
    shape: torch.Size

    @staticmethod
    def _chunks(dense: Tensor, height: int, m: int) -> Tensor:
        """Return a tensor, as a matrix, cut into chunks (chunks, blocks, height, m)."""
        matrix = _pad(_matrix(dense), height, m)
        return matrix.unflatten(0, (-1, height)).unflatten(2, (-1, m)).transpose(1, 2)

    @classmethod
    def largest(cls, dense: Tensor, n: int, m: int, g: int) -> Self:
        """Keep the largest sum of magnitudes: an assignment of every chunk's rows to patterns."""
        chunks = cls._chunks(dense, math.comb(m, n) * g, m)
        rows = grouped_nm.assign(chunks.detach().abs(), n, g)
        values = chunks.flatten(2).gather(2, grouped_nm.places(rows, n, m).flatten(2))
        return cls(values.unflatten(2, (*rows.shape[2:], n)), rows, m, dense.shape)

    def dense(self) -> Tensor:
        """Return the whole tensor, zeros included."""
        return _crop(grouped_nm.to_matrix(self.values, self.rows, self.values.shape[4], self.m), self.shape)

    def take(self, dense: Tensor) -> Tensor:
        """Return the entries of another tensor that stand where this one keeps its own, as values."""
        patterns, g, n = self.values.shape[2:]
        chunks = self._chunks(dense, patterns * g, self.m)
        return (
            chunks.flatten(2)
            .gather(2, grouped_nm.places(self.rows, n, self.m).flatten(2))
            .view_as(self.values)
        )
