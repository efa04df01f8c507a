"""Batches against plain loops over the same images."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from omniconv.core.errors import DataError
from omniconv.core.seeds import generator
from omniconv.data.batches import Batches
from omniconv.data.preprocess import resize
from omniconv.data.sources import open_images


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(23):
        (root / "ab"[number % 2]).mkdir(exist_ok=True)
        size = (9 + number % 5, 12)
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(
            root / "ab"[number % 2] / f"{number:02}.png"
        )
    return root


def listed(batches):
    return [(step, x.clone(), y, i) for step, x, y, i in batches]


def same(first, second) -> bool:
    return len(first) == len(second) and all(
        a[0] == b[0] and all(p.equal(q) for p, q in zip(a[1:], b[1:], strict=True))
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("cache_bytes", [0, 8 * 3 * 64, 1 << 30])
def test_values_order_and_workers(folder, workers, cache_bytes):
    data = open_images(folder)
    indices = list(range(1, 23))
    batches = Batches(data, indices, 8, batch_size=5, seed=3, workers=workers, cache_bytes=cache_bytes)
    assert batches.steps_per_epoch == 4
    for epoch in range(3):  # the second and third come from the cache, as far as it reaches
        order = torch.randperm(22, generator=generator(3, "order", epoch))
        found = listed(batches.epoch(epoch))
        assert [step for step, *_ in found] == [0, 1, 2, 3]
        for step, images, targets, chosen in found:
            assert chosen.tolist() == [indices[i] for i in order[step * 5 : step * 5 + 5]]
            for image, target, index in zip(images, targets, chosen.tolist(), strict=True):
                expected = resize(data.read(index)[None].float(), (8, 8))[0].round().to(torch.uint8)
                assert image.equal(expected)
                assert target == data.samples[index].target
        assert targets.dtype == torch.int64


def test_sequential_holds_everything_in_order(folder):
    data = open_images(folder)
    for workers in (0, 2):
        found = listed(Batches(data, range(23), (8, 6), batch_size=5, seed=0, workers=workers).sequential())
        assert torch.cat([i for *_, i in found]).tolist() == list(range(23))
        assert [len(x) for _, x, _, _ in found] == [5, 5, 5, 5, 3]
        assert found[0][1].shape == (5, 3, 8, 6)


def test_start_and_ranks(folder):
    data = open_images(folder)
    batches = Batches(data, range(23), 8, batch_size=6, seed=1)
    whole = listed(batches.epoch(4))
    assert same(listed(Batches(data, range(23), 8, batch_size=6, seed=1).epoch(4, start=2)), whole[2:])
    halves = [listed(batches.epoch(4, rank=rank, world=2)) for rank in (0, 1)]
    for step in range(3):
        assert torch.cat([halves[0][step][1], halves[1][step][1]]).equal(whole[step][1])


def test_order_depends_on_seed_and_epoch():
    data = open_images("digits")
    orders = {
        (seed, epoch): torch.cat(
            [i for *_, i in Batches(data, range(99), 8, batch_size=9, seed=seed).epoch(epoch)]
        )
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    values = list(orders.values())
    assert all(sorted(order.tolist()) == list(range(99)) for order in values)
    assert not any(a.equal(b) for n, a in enumerate(values) for b in values[:n])


def test_images_in_memory_are_not_copied():
    data = open_images("digits")
    batches = Batches(data, range(100), 8, batch_size=10, seed=0, workers=4)
    before = threading.active_count()
    for _, images, _, indices in batches.epoch(0):
        assert images.equal(data.stacked[indices])
        assert threading.active_count() == before
    assert batches._cache.numel() == 0
    resized = Batches(data, range(100), 12, batch_size=10, seed=0)
    _, images, _, indices = next(resized.epoch(0))
    assert images.equal(resize(data.stacked[indices].float(), (12, 12)).round().to(torch.uint8))


def test_fewer_images_than_a_batch_are_one_step():
    batches = Batches(open_images("digits"), range(7), 8, batch_size=10, seed=0)
    assert batches.steps_per_epoch == 1
    assert [len(x) for _, x, _, _ in batches.epoch(0)] == [7]
    empty = Batches(open_images("digits"), [], 8, batch_size=10, seed=0)
    assert (empty.steps_per_epoch, listed(empty.epoch(0)), listed(empty.sequential())) == (0, [], [])


def test_sixteen_bits_and_other_targets(tmp_path):
    lines = ["path,x,y"]
    for number in range(4):
        Image.fromarray(np.full((5, 6), 1000 * number, np.uint16)).save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,{number / 2},{number}")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    data = open_images(tmp_path, target=["x", "y"], task="regression")
    ((_, images, targets, _),) = Batches(data, range(4), 3, batch_size=4, seed=0).sequential()
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 3, 3) * 1000)
    assert (targets.dtype, targets.tolist()) == (torch.float32, [[n / 2, n] for n in range(4)])
    ((_, _, none, _),) = Batches(
        open_images(tmp_path, task="none"), range(4), 3, batch_size=4, seed=0
    ).sequential()
    assert none.tolist() == [-1] * 4


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_named(tmp_path, workers):
    for number in range(6):
        Image.new("L", (9, 9)).save(tmp_path / f"{number}.png")
    content = (tmp_path / "3.png").read_bytes()
    (tmp_path / "3.png").write_bytes(content[:-20])
    batches = Batches(open_images(tmp_path), range(6), 4, batch_size=2, seed=0, workers=workers)
    before = threading.active_count()
    with pytest.raises(DataError, match=r"3\.png is unreadable"):
        listed(batches.sequential())
    assert threading.active_count() == before


def test_wrong_arguments():
    with pytest.raises(ValueError, match="batch_size and size must be positive"):
        Batches(open_images("digits"), [0], 8, batch_size=0, seed=0)
