"""A sparse map: the features of its active sites, and where these are."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["SparseTensor"]


@dataclass(frozen=True, eq=False)
class SparseTensor:
    """A batch of maps with d axes of which only P active sites are stored.

    Attributes:
        features: (P, C).
        coordinates: (P, 1 + d), int64: sample of the batch, then position; no row twice.
        shape: the d sizes of the maps.
        batch_size: samples, those without active sites included.
        maps: kernel maps of these coordinates by what they depend on; layers at the same sites share them.
    """

    features: Tensor
    coordinates: Tensor
    shape: tuple[int, ...]
    batch_size: int
    maps: dict[tuple, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        wanted = (self.features.shape[0], 1 + len(self.shape))
        if self.features.ndim != 2 or self.coordinates.shape != wanted:
            raise ValueError(
                f"features must be (P, C) and coordinates (P, {wanted[1]}): "
                f"got {tuple(self.features.shape)} and {tuple(self.coordinates.shape)}"
            )
        if self.coordinates.dtype != torch.int64:
            raise ValueError(f"coordinates must be int64: got {self.coordinates.dtype}")

    @classmethod
    def from_dense(cls, x: Tensor) -> "SparseTensor":
        """Return maps `(N, C, *S)` as a sparse one whose sites are those with a channel that is not zero."""
        coordinates = (x != 0).any(1).nonzero()
        features = x.movedim(1, -1)[tuple(coordinates.T)]
        return cls(features, coordinates, tuple(x.shape[2:]), x.shape[0])

    def dense(self) -> Tensor:
        """Return the maps as `(N, C, *S)`, zero where no site is active."""
        y = self.features.new_zeros(self.batch_size, *self.shape, self.features.shape[1])
        return y.index_put(tuple(self.coordinates.T), self.features).movedim(-1, 1)

    def replace(self, features: Tensor) -> "SparseTensor":
        """Return the same sites with other features (P, C')."""
        return SparseTensor(features, self.coordinates, self.shape, self.batch_size, self.maps)
