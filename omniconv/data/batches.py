"""Batches of equal size from a set of images, in an order that depends on seed and epoch alone."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from omniconv.core.seeds import generator
from omniconv.data.preprocess import resize
from omniconv.data.sources import ImageData

__all__ = ["Batch", "Batches"]

Batch = tuple[int, Tensor, Tensor, Tensor]
"""(step, images (N, C, h, w), targets, indices into the data)."""

_AHEAD = 2  # batches that are decoded while one is used


class Batches:
    """Images of one split, resized to one size and kept in memory as far as they fit.

    The first pass decodes; later ones index one tensor. Images that are in memory already and have the right
    size are indexed where they are. Values, order and dtype are the same for any number of workers.

    Args:
        data: the images.
        indices: which of them, in the order of `sequential`.
        size: of the batches in pixels, one number for a square or (height, width).
        batch_size: images a step, over all ranks.
        seed: of the order.
        workers: threads that decode; 0 decodes in the calling thread.
        cache_bytes: how much memory resized images may take; what does not fit is decoded in every pass.

    Raises:
        ValueError: if `batch_size` or a size is not positive.
    """

    def __init__(
        self,
        data: ImageData,
        indices: Sequence[int],
        size: int | tuple[int, int],
        *,
        batch_size: int,
        seed: int,
        workers: int = 0,
        cache_bytes: int = 4 << 30,
    ) -> None:
        self.size = (size, size) if isinstance(size, int) else (size[0], size[1])
        if batch_size < 1 or min(self.size) < 1:
            raise ValueError(f"batch_size and size must be positive: got {batch_size} and {self.size}")
        self.data, self.batch_size, self.seed, self.workers = data, batch_size, seed, workers
        self.indices = torch.as_tensor(list(indices), dtype=torch.long)
        self.targets = _targets(data, self.indices.tolist())
        schema = data.schema
        stacked = data.stacked
        self._direct = stacked if stacked is not None and stacked.shape[2:] == self.size else None
        each = schema.channels * self.size[0] * self.size[1] * data.dtype.itemsize
        room = 0 if self._direct is not None else min(len(self.indices), cache_bytes // each)
        self._cache = torch.empty((room, schema.channels, *self.size), dtype=data.dtype)
        self._cached = torch.zeros(room, dtype=torch.bool)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.indices)

    @property
    def steps_per_epoch(self) -> int:
        """Steps that `epoch` yields: full batches only, and one smaller batch if there is no full one."""
        return max(len(self) // self.batch_size, min(len(self), 1))

    def epoch(self, epoch: int, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Yield the batches of one epoch, in an order drawn from (seed, epoch).

        Args:
            epoch: which epoch.
            start: first step to yield, for a run that continues within an epoch.
            rank: which share of every batch to yield.
            world: into how many equal shares a batch is cut.
        """
        order = torch.randperm(len(self), generator=generator(self.seed, "order", epoch))
        batch = min(self.batch_size, len(self))
        share = batch // world
        steps = range(start, self.steps_per_epoch)
        chosen = [order[s * batch + rank * share : s * batch + (rank + 1) * share] for s in steps]
        yield from self._yield(steps, chosen)

    def sequential(self) -> Iterator[Batch]:
        """Yield all images in order; the last batch may be smaller."""
        chosen = list(torch.arange(len(self)).split(self.batch_size)) if len(self) else []
        yield from self._yield(range(len(chosen)), chosen)

    def _yield(self, steps: range, chosen: list[Tensor]) -> Iterator[Batch]:
        if self.workers == 0 or self._direct is not None or self._complete:
            for step, positions in zip(steps, chosen, strict=True):
                yield step, self._images(positions), self.targets[positions], self.indices[positions]
            return
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                ahead: list[list[Future[Tensor]]] = []
                for number, (step, positions) in enumerate(zip(steps, chosen, strict=True)):
                    for later in chosen[number + len(ahead) : number + 1 + _AHEAD]:
                        ahead.append([pool.submit(self._image, p) for p in later.tolist()])
                    images = torch.stack([future.result() for future in ahead.pop(0)])
                    yield step, images, self.targets[positions], self.indices[positions]
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    @property
    def _complete(self) -> bool:
        return len(self._cached) == len(self) and bool(self._cached.all())

    def _images(self, positions: Tensor) -> Tensor:
        if self._direct is not None:
            return self._direct[self.indices[positions]]
        if self._complete:
            return self._cache[positions]
        return torch.stack([self._image(position) for position in positions.tolist()])

    def _image(self, position: int) -> Tensor:
        if position < len(self._cached) and self._cached[position]:
            return self._cache[position]
        image = fit(self.data.read(int(self.indices[position])), self.size)
        if position < len(self._cached):
            self._cache[position] = image
            self._cached[position] = True
        return image


def fit(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Return an image (C, H, W) resized to `size`, in its own dtype."""
    if image.shape[1:] == size:
        return image
    resized = resize(image[None].float(), size)[0]
    return resized if image.dtype.is_floating_point else resized.round_().clamp_(0, 255).to(image.dtype)


def _targets(data: ImageData, indices: list[int]) -> Tensor:
    targets = [data.samples[index].target for index in indices]
    if data.schema.task == "classification":
        return torch.tensor(targets, dtype=torch.long)
    if data.schema.task == "none":
        return torch.full((len(targets),), -1)
    return torch.tensor(targets, dtype=torch.float32).reshape(len(targets), len(data.schema.classes))
