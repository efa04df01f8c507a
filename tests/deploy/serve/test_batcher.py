import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from omniconv.deploy.serve.batcher import Batcher, Closed, QueueFull


class Gate:
    """Work that doubles numbers, notes its batches, and waits while closed."""

    def __init__(self):
        self.batches, self.open, self.begun = [], threading.Event(), threading.Event()

    def __call__(self, values):
        self.batches.append(list(values))
        self.begun.set()
        assert self.open.wait(20)
        if 13 in values:
            raise ValueError("unlucky")
        return [2 * value for value in values]


def run(scenario, **options):
    """Run `scenario(batcher, gate)` on a fresh batcher."""
    settings = {"max_batch": 4, "max_wait_ms": 1, "queue": 8, **options}
    gate = Gate()

    async def main():
        with ThreadPoolExecutor(1) as executor:
            batcher = Batcher(gate, executor, **settings)
            batcher.start()
            try:
                await scenario(batcher, gate)
            finally:
                gate.open.set()
                await batcher.close()

    asyncio.run(main())
    return gate


async def blocked(batcher, gate):
    """Return the task of an item that is being computed while the gate is closed."""
    task = asyncio.create_task(batcher.submit([0]))
    await asyncio.to_thread(gate.begun.wait, 20)
    return task


async def waiting(batcher, *values):
    tasks = [asyncio.create_task(batcher.submit([value])) for value in values]
    await asyncio.sleep(0)
    return tasks


def test_items_that_wait_go_together_and_results_go_back_to_their_callers():
    async def scenario(batcher, gate):
        first = await blocked(batcher, gate)
        tasks = await waiting(batcher, 1, 2, 3, 4, 5, 6)
        gate.open.set()
        assert await asyncio.gather(first, *tasks) == [[0], [2], [4], [6], [8], [10], [12]]

    assert run(scenario).batches == [[0], [1, 2, 3, 4], [5, 6]]


def test_one_caller_may_bring_several():
    async def scenario(batcher, gate):
        gate.open.set()
        assert await batcher.submit([1, 2, 3, 4, 5]) == [2, 4, 6, 8, 10]

    run(scenario)


def test_weights_end_a_batch_early():
    async def scenario(batcher, gate):
        first = await blocked(batcher, gate)
        tasks = [
            asyncio.create_task(batcher.submit([value], [weight]))
            for value, weight in ((1, 6), (2, 5), (3, 30))
        ]
        await asyncio.sleep(0)
        gate.open.set()
        await asyncio.gather(first, *tasks)

    assert run(scenario, max_weight=10).batches == [[0], [1], [2], [3]]


def test_a_bad_item_harms_nobody_else():
    async def scenario(batcher, gate):
        first = await blocked(batcher, gate)
        good, bad, other = await waiting(batcher, 1, 13, 3)
        gate.open.set()
        assert await first == [0]
        assert await good == [2]
        assert await other == [6]
        with pytest.raises(ValueError, match="unlucky"):
            await bad

    run(scenario)


def test_full_means_full_for_all_of_a_callers_items():
    async def scenario(batcher, gate):
        first = await blocked(batcher, gate)
        tasks = await waiting(batcher, *range(1, 8))
        with pytest.raises(QueueFull) as caught:
            await batcher.submit([1, 2])
        assert caught.value.retry_after >= 1
        assert len(batcher) == 7
        tasks += await waiting(batcher, 8)
        with pytest.raises(QueueFull):
            await batcher.submit([9])
        gate.open.set()
        await asyncio.gather(first, *tasks)

    run(scenario)


def test_who_gives_up_is_not_computed():
    async def scenario(batcher, gate):
        first = await blocked(batcher, gate)
        keep, drop = await waiting(batcher, 1, 2)
        drop.cancel()
        await asyncio.gather(drop, return_exceptions=True)
        assert len(batcher) == 1
        gate.open.set()
        await asyncio.gather(first, keep)

    assert run(scenario).batches == [[0], [1]]


def test_closing_finishes_what_waits_and_takes_nothing_more():
    async def scenario(batcher, gate):
        first = await blocked(batcher, gate)
        tasks = await waiting(batcher, 1, 2)
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0)
        with pytest.raises(Closed):
            await batcher.submit([3])
        gate.open.set()
        await closing
        assert await asyncio.gather(first, *tasks) == [[0], [2], [4]]

    run(scenario)


def test_work_that_returns_too_little_is_an_error_not_a_mix_up():
    async def main():
        with ThreadPoolExecutor(1) as executor:
            batcher = Batcher(lambda values: [], executor, max_batch=2, max_wait_ms=0, queue=2)
            batcher.start()
            with pytest.raises(RuntimeError, match="1 values gave 0 results"):
                await batcher.submit([1])
            await batcher.close()

    asyncio.run(main())
