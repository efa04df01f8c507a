"""Micro-batching: requests that arrive together are computed together, in a queue that cannot grow without end."""

import asyncio
import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

__all__ = ["Batcher", "Closed", "QueueFull"]


class QueueFull(Exception):
    """There is no room for these items now.

    Attributes:
        retry_after: whole seconds after which there should be.
    """

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"queue full; retry after {retry_after} s")
        self.retry_after = retry_after


class Closed(Exception):
    """The batcher finishes what it has and takes nothing more."""


@dataclass(frozen=True)
class _Item:
    value: Any
    weight: int
    since: float
    future: asyncio.Future


class Batcher:
    """Collects items of concurrent callers and hands them to one worker as batches.

    A batch starts when it is full, or when its oldest item has waited long enough. While one is computed the
    next collects. If a batch fails, its items are tried one by one, so that a bad one harms nobody else.

    Args:
        work: function from a list of values to the list of their results; it runs in `executor`. A result that is
            an exception is raised where the value came from.
        executor: where `work` runs.
        max_batch: items in a batch.
        max_wait_ms: how long the oldest item waits for others, in milliseconds.
        queue: items that may wait.
        max_weight: a batch ends before the weights of its items sum to more than this.
        on_batch: called with the size of every batch.
    """

    def __init__(
        self,
        work: Callable[[list[Any]], Sequence[Any]],
        executor: Executor,
        *,
        max_batch: int,
        max_wait_ms: float,
        queue: int,
        max_weight: float = math.inf,
        on_batch: Callable[[int], None] | None = None,
    ) -> None:
        self.work, self.executor, self.on_batch = work, executor, on_batch
        self.max_batch, self.max_wait, self.queue, self.max_weight = (
            max_batch,
            max_wait_ms / 1e3,
            queue,
            max_weight,
        )
        self._waiting: deque[_Item] = deque()
        self._arrived = asyncio.Event()
        self._closed = False
        self._task: asyncio.Task[None] | None = None
        self._seconds = 0.0  # of a batch, averaged over the latest ones

    def __len__(self) -> int:
        """Number of items that wait."""
        return len(self._waiting)

    def start(self) -> None:
        """Start to work; needs a running event loop."""
        self._task = asyncio.create_task(self._loop())

    async def close(self) -> None:
        """Take nothing more and return when everything in the queue is done."""
        self._closed = True
        self._arrived.set()
        if self._task is not None:
            await self._task

    def check_room(self, count: int = 1) -> None:
        """Raise Closed or QueueFull if `count` items could not be submitted now."""
        if self._closed:
            raise Closed
        if len(self._waiting) + count > self.queue:
            batches = len(self._waiting) / self.max_batch + 1
            raise QueueFull(max(1, math.ceil(batches * self._seconds)))

    async def submit(self, values: Sequence[Any], weights: Sequence[int] | None = None) -> list[Any]:
        """Return the results of `values`; all of them enter the queue, or none does.

        Cancelling the call takes those out that have not been started.

        Raises:
            Closed: after `close`.
            QueueFull: if they do not all fit into the queue.
        """
        self.check_room(len(values))
        loop = asyncio.get_running_loop()
        items = [
            _Item(value, weight, loop.time(), loop.create_future())
            for value, weight in zip(values, weights or [0] * len(values), strict=True)
        ]
        self._waiting.extend(items)
        self._arrived.set()
        try:
            results = await asyncio.gather(*(item.future for item in items))
        finally:
            self._waiting = deque(item for item in self._waiting if not item.future.done())
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results

    async def _loop(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting or not self._closed:
            if not self._waiting:
                await self._arrival()
                continue
            deadline = self._waiting[0].since + self.max_wait
            while len(self._waiting) < self.max_batch and not self._closed:
                left = deadline - loop.time()
                if left <= 0 or not await self._arrival(left):
                    break
            batch = self._take()
            if batch:
                started = loop.time()
                values = [item.value for item in batch]
                results = await loop.run_in_executor(self.executor, self._attempt, values)
                seconds = loop.time() - started
                self._seconds = seconds if self._seconds == 0 else 0.8 * self._seconds + 0.2 * seconds
                for item, result in zip(batch, results, strict=True):
                    if not item.future.done():
                        item.future.set_result(result)

    async def _arrival(self, seconds: float | None = None) -> bool:
        """Wait for the next item (or the end) and return whether it came in time."""
        self._arrived.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._arrived.wait()
        except TimeoutError:
            return False
        return True

    def _take(self) -> list[_Item]:
        batch: list[_Item] = []
        weight = 0
        while self._waiting and len(batch) < self.max_batch:
            item = self._waiting[0]
            if batch and weight + item.weight > self.max_weight:
                break
            self._waiting.popleft()
            if not item.future.done():
                batch.append(item)
                weight += item.weight
        return batch

    def _attempt(self, values: list[Any]) -> list[Any]:
        """Return a result, or the exception, for each value."""
        if self.on_batch is not None:
            self.on_batch(len(values))
        try:
            results = list(self.work(values))
            if len(results) != len(values):
                raise RuntimeError(f"{len(values)} values gave {len(results)} results")
            return results
        except Exception as error:  # whatever it is, it belongs to the caller who sent the value
            if len(values) == 1:
                return [error]
            return [self._attempt([value])[0] for value in values]
