"""Training, validation and test images that share nothing: stratified, and copies and groups kept together."""

import csv
import io
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from omniconv.core.errors import DataError
from omniconv.core.files import atomic_write
from omniconv.core.seeds import generator
from omniconv.data.schema import Problem, Sample, printable
from omniconv.data.sources import ImageData

__all__ = ["Splits", "load_splits", "make_splits", "save_splits"]

Splits = dict[str, list[int]]
_ORDER = ("train", "val", "test")
_HELD_OUT_SHARE, _HELD_OUT_MOST = 0.1, 5000  # of given training images, for a split that the data lacks
_BINS = 10  # of a regression's values


def make_splits(
    data: ImageData, problems: Sequence[Problem], *, seed: int, val: float = 0.15, test: float = 0.15
) -> Splits:
    """Return the indices of the training, validation and test images.

    Splits that the data gives are kept. If it gives training images and only one of val and test, the other is
    taken from the training images (at most 10% and 5,000). Otherwise all images are divided. What is divided
    is stratified by class (by value for a regression), and images with the same group, duplicates and
    near-duplicates go to one split. Unreadable images, and copies that span given splits, are left out, as the
    problems say.

    Args:
        data: the images.
        problems: what `audit` found.
        seed: of the division.
        val: share of the validation images.
        test: share of the test images.

    Raises:
        ValueError: if the shares leave no training images.
    """
    if val < 0 or test < 0 or val + test >= 1:
        raise ValueError(f"val and test must be shares that leave some for training: got {val} and {test}")
    dropped = {
        name for problem in problems if problem.kind in ("unreadable", "leakage") for name in problem.ids
    }
    usable = [i for i, sample in enumerate(data.samples) if sample.id not in dropped]
    given = {name: [i for i in usable if data.samples[i].split == name] for name in _ORDER}
    loose = [i for i in usable if data.samples[i].split is None]
    if given["val"] and given["test"]:
        return {"train": sorted(given["train"] + loose), "val": given["val"], "test": given["test"]}
    pool = given["train"] + loose
    if given["val"] or given["test"]:
        if not pool:
            return {"train": [], "val": given["val"], "test": given["test"]}
        lacking = "test" if given["val"] else "val"
        most = min(_HELD_OUT_SHARE, _HELD_OUT_MOST / len(pool))
        shares = {lacking: min(test if lacking == "test" else val, most)}
    else:
        shares = {"val": val, "test": test}
    divided = _divide(
        data.samples, sorted(pool), _units(data.samples, problems), shares, seed, data.schema.task
    )
    return {name: sorted(divided.get(name, []) + (given[name] if name != "train" else [])) for name in _ORDER}


def _units(samples: Sequence[Sample], problems: Sequence[Problem]) -> dict[int, int]:
    """Return for every sample the first one of those that must go with it."""
    parent = list(range(len(samples)))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    def join(members: Iterable[int]) -> None:
        first, *rest = members
        for other in rest:
            a, b = sorted((find(first), find(other)))
            parent[b] = a

    place = {sample.id: i for i, sample in enumerate(samples)}
    for problem in problems:
        if problem.kind in ("duplicate", "near-duplicate"):
            for group in problem.groups:
                join(place[name] for name in group)
    groups: dict[str, list[int]] = defaultdict(list)
    for i, sample in enumerate(samples):
        if sample.group is not None:
            groups[sample.group].append(i)
    for members in groups.values():
        join(members)
    return {i: find(i) for i in range(len(samples))}


def _strata(samples: Sequence[Sample], pool: Sequence[int], task: str) -> dict[int, tuple[int, ...]]:
    """Return the strata of every sample: its classes, or the bin of its value."""
    if task == "regression":
        ranked = sorted(pool, key=lambda i: (samples[i].target, i))
        return {i: (rank * _BINS // len(ranked),) for rank, i in enumerate(ranked)}
    strata = {}
    for i in pool:
        target = samples[i].target
        if isinstance(target, tuple):
            # Images without any label are a stratum of their own.
            strata[i] = tuple(c for c, value in enumerate(target) if value) or (-1,)
        else:
            strata[i] = (target if target is not None else -1,)
    return strata


def _divide(
    samples: Sequence[Sample],
    pool: Sequence[int],
    unit_of: Mapping[int, int],
    shares: Mapping[str, float],
    seed: int,
    task: str,
) -> Splits:
    """Give units to the split that lacks most of their strata, large units first."""
    shares = {"train": 1 - sum(shares.values()), **shares}
    strata = _strata(samples, pool, task)
    members: dict[int, list[int]] = defaultdict(list)
    for i in pool:
        members[unit_of[i]].append(i)
    units = list(members.values())
    totals: dict[int, int] = defaultdict(int)
    for i in pool:
        for stratum in strata[i]:
            totals[stratum] += 1
    wanted = {name: {s: share * total for s, total in totals.items()} for name, share in shares.items()}
    room = {name: share * len(pool) for name, share in shares.items()}
    shuffled = torch.randperm(len(units), generator=generator(seed, "splits")).tolist()
    # Then rare strata, which have the least choice.
    order = sorted(
        shuffled, key=lambda u: (-len(units[u]), min(totals[s] for i in units[u] for s in strata[i]))
    )
    out: Splits = {name: [] for name in shares}
    homes: dict[int, str] = {}
    for u in order:
        parts = [s for i in units[u] for s in strata[i]]

        def need(name: str, parts: list[int] = parts, single: bool = len(units[u]) == 1) -> list[float]:
            lack = [
                round(wanted[name][s] / totals[s], 9) for s in sorted(parts, key=lambda s: (totals[s], s))
            ]
            # One image goes where its rarest label is missing most; a group where all its labels together are.
            return [*(lack if single else [sum(lack)]), room[name]]

        # `max` takes the first of equals: train.
        home = max((name for name in shares if shares[name] > 0), key=need)
        homes[u] = home
        out[home] += units[u]
        room[home] -= len(units[u])
        for s in parts:
            wanted[home][s] -= 1
    _fill(out, homes, units, order, strata, {n: s * len(pool) for n, s in shares.items()})
    return out


def _fill(
    out: Splits,
    homes: dict[int, str],
    units: Sequence[list[int]],
    order: Sequence[int],
    strata: Mapping[int, tuple[int, ...]],
    ideal: Mapping[str, float],
) -> None:
    """Move units out of train to splits that got less than half of their share, as with many tiny classes."""
    left: dict[int, int] = defaultdict(int)
    for i in out["train"]:
        for s in strata[i]:
            left[s] += 1
    for name in out:
        if name == "train":
            continue
        for u in reversed(order):
            if len(out[name]) >= max(1.0, ideal[name] / 2) or ideal[name] == 0:
                break
            parts = [s for i in units[u] for s in strata[i]]
            spare = all(left[s] > parts.count(s) for s in parts) and len(out["train"]) > len(units[u])
            if homes[u] == "train" and spare and len(units[u]) <= max(1.0, 2 * ideal[name]):
                homes[u] = name
                moved = set(units[u])
                out["train"] = [i for i in out["train"] if i not in moved]
                out[name] += units[u]
                for s in parts:
                    left[s] -= 1


# Stored splits


def _target_text(data: ImageData, sample: Sample) -> str:
    if isinstance(sample.target, int):
        return data.schema.classes[sample.target]
    if sample.target is None:
        return ""
    if data.schema.task == "multilabel":
        return "|".join(n for n, value in zip(data.schema.classes, sample.target, strict=True) if value)
    return "|".join(map(repr, sample.target))


def save_splits(path: str | os.PathLike[str], data: ImageData, splits: Mapping[str, Sequence[int]]) -> None:
    """Write one line a sample, `id,split,target`, atomically; samples that are in no split have an empty one."""
    home = {index: name for name, indices in splits.items() for index in indices}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "split", "target"])
    for index, sample in enumerate(data.samples):
        writer.writerow([sample.id, home.get(index, ""), _target_text(data, sample)])
    atomic_write(path, text.getvalue())


def load_splits(path: str | os.PathLike[str], data: ImageData) -> Splits:
    """Return the splits that `save_splits` wrote, as indices into `data`.

    Raises:
        DataError: if the file is damaged, or names other samples than the data has.
    """
    name = printable(os.fspath(path))
    try:
        rows = list(csv.reader(io.StringIO(Path(path).read_bytes().decode(), newline=""), strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror.lower() if isinstance(error, OSError) and error.strerror else error
        raise DataError(f"{name} is unreadable: {reason}") from None
    if not rows or rows[0] != ["id", "split", "target"]:
        raise DataError(f"{name} must begin with the line id,split,target")
    place = {sample.id: i for i, sample in enumerate(data.samples)}
    splits: Splits = {split: [] for split in _ORDER}
    seen: set[str] = set()
    for number, row in enumerate(rows[1:], 2):
        if len(row) != 3 or row[1] not in (*_ORDER, ""):
            raise DataError(
                f"{name} line {number} must be an id, a split (train, val, test or nothing) and a target"
            )
        if row[0] not in place:
            raise DataError(f"{name} line {number} names {row[0]}, which the data does not have")
        if row[0] in seen:
            raise DataError(f"{name} line {number} names {row[0]} again")
        seen.add(row[0])
        if row[1]:
            splits[row[1]].append(place[row[0]])
    for sample in data.samples:
        if sample.id not in seen:
            raise DataError(f"{name} has no line for {sample.id}; the data has changed since it was written")
    return {split: sorted(indices) for split, indices in splits.items()}
