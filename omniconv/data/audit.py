"""Look at every image and every label, and say what may spoil a training."""

import difflib
import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from torch.nn import functional as F

from omniconv.core.errors import DataError, ResourceError
from omniconv.data.preprocess import resize
from omniconv.data.schema import Problem, counted, spoken
from omniconv.data.sources import ImageData

__all__ = ["audit"]

_CHUNK = 1024
_THUMB, _LOW = 32, 8  # sides of the two small images by which near-duplicates are found
# Two images are near-duplicates if their 32 x 32 grey versions differ by less than 8 of 255 (root mean square)
# and agree in coarse form and in fine detail. Measured: 98% of 1,000 CIFAR-10 images are matched to their JPEG
# (quality 75) copies, while MNIST's 10,000 test images give no pair and Fashion-MNIST's 40,000 give 26.
_RMS, _COARSE, _FINE = 8.0, 0.98, 0.75
_MANY_PAIRS = 200  # candidates an image beyond which a set is one of look-alikes
_CROWD, _CROWD_SHARE = 50, 0.05  # a group of this size and share is a scene, not a copied image
_TINY, _UNBALANCED = 5, 10
_RARE = 0.1  # a misspelled class has at most this share of the images of the right one

Groups = list[list[int]]


@dataclass
class _Scan:
    """What one pass over all images leaves behind; rows of images that failed are zero."""

    hashes: list[bytes]
    constant: np.ndarray
    thumbs: Tensor
    faults: dict[int, str]


def audit(
    data: ImageData, *, near: bool = True, progress: Callable[[int, int], None] | None = None
) -> list[Problem]:
    """Decode every image and return everything that is wrong, the problems found while opening included.

    Found are: unreadable images, exact duplicates and near-duplicates (copies that were re-encoded, resized or
    slightly edited), identical images with different labels, copies that span the given splits, constant
    images, unbalanced and tiny classes, classes without training images, and class names that look misspelled.

    Args:
        data: the images.
        near: whether to search near-duplicates; the time grows with the square of the number of images.
        progress: called now and then with (images done, all images).
    """
    scan = _scan(data, progress or (lambda done, total: None))
    problems = [problem for problem in data.problems if problem.kind != "unreadable"]
    ids = [sample.id for sample in data.samples]
    for index, message in sorted(scan.faults.items()):
        problems.append(Problem("unreadable", message, (ids[index],), "error"))
    exact = _exact(scan)
    problems += _duplicates(data, exact, "duplicate", "exact copy", "exact copies")
    problems += _conflicts(data, exact)
    similar: Groups = []
    if near:
        similar, crowds = _near(scan, exact)
        problems += _duplicates(data, similar, "near-duplicate", "near-duplicate", "near-duplicates")
        if crowds:
            problems.append(
                Problem(
                    "look-alikes",
                    f"{crowds:,} images look so much alike that copies among them cannot be told; if they are frames "
                    "of one video or views of one object, keep them together with a group column",
                    (),
                )
            )
    problems += _leakage(data, exact, similar)
    if scan.constant.any():
        found = [ids[i] for i in np.flatnonzero(scan.constant)]
        message = f"{counted(len(found), 'image')} with one value everywhere: {spoken(found)}"
        problems.append(Problem("constant", message, tuple(found)))
    if data.schema.task in ("classification", "multilabel"):
        problems += _classes(data)
    return problems


# One pass over all pixels


def _scan(data: ImageData, progress: Callable[[int, int], None]) -> _Scan:
    total = len(data)
    schema = data.schema
    side = min(_THUMB, schema.height, schema.width)
    scan = _Scan([b""] * total, np.zeros(total, bool), torch.zeros(total, side, side), {})

    def note(index: int, image: Tensor) -> None:
        array = np.ascontiguousarray(image.numpy())
        digest = hashlib.blake2b(repr(array.shape).encode(), digest_size=16)
        digest.update(array.data.cast("B"))
        scan.hashes[index] = digest.digest()
        scan.constant[index] = bool((array == array[:, :1, :1]).all())

    def small(images: Tensor) -> Tensor:
        scaled = (images.float() - schema.low) * (255 / (schema.high - schema.low))
        return resize(_grey(scaled), (side, side))[:, 0]

    def look(index: int) -> None:
        try:
            image = data.read(index)
        except (DataError, ResourceError) as error:
            scan.faults[index] = str(error)
            return
        note(index, image)
        scan.thumbs[index] = small(image[None])[0]

    # Pixels are decoded and hashed without Python's lock; every image writes its own row.
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for start in range(0, total, _CHUNK):
            chunk = range(start, min(start + _CHUNK, total))
            if data.stacked is None:
                list(pool.map(look, chunk))
            else:
                for index in chunk:
                    note(index, data.stacked[index])
                scan.thumbs[start : chunk.stop] = small(data.stacked[start : chunk.stop])
            progress(chunk.stop, total)
    return scan


def _grey(images: Tensor) -> Tensor:
    """Return (N, 1, H, W): luma, so that a colour image and its grey copy are alike; else the mean."""
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    return (images * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)


def _exact(scan: _Scan) -> Groups:
    places: dict[bytes, list[int]] = defaultdict(list)
    for index, digest in enumerate(scan.hashes):
        if digest:
            places[digest].append(index)
    return [group for group in places.values() if len(group) > 1]


# Near-duplicates


def _near(scan: _Scan, exact: Groups) -> tuple[Groups, int]:
    """Return groups of near-duplicates (of exact copies only the first) and how many images are look-alikes."""
    copies = {index for group in exact for index in group[1:]}
    wanted = [
        i for i, digest in enumerate(scan.hashes) if digest and i not in copies and not scan.constant[i]
    ]
    if len(wanted) < 2 or scan.thumbs.shape[1] < _LOW:
        return [], 0
    thumbs = scan.thumbs[wanted]
    pairs = []
    for rows, columns in _candidates(thumbs):
        if len(rows):
            pairs.append(torch.stack([rows, columns], 1)[_verified(thumbs, rows, columns)])
        if sum(map(len, pairs)) > _MANY_PAIRS * len(wanted):
            return [], len(wanted)
    if not pairs:
        return [], 0
    links = torch.cat(pairs).numpy()
    groups: Groups = []
    crowds = 0
    for group in _components(links, len(wanted)):
        if len(group) > max(_CROWD, _CROWD_SHARE * len(wanted)):
            crowds += len(group)
        else:
            groups.append([wanted[i] for i in group])
    return groups, crowds


def _candidates(thumbs: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield pairs (i, j), i < j, whose 8 x 8 versions are close; averaging brings no two images further apart."""
    low = resize(thumbs[:, None], (_LOW, _LOW)).flatten(1)
    low = low - low.mean(0)
    squares = low.square().sum(1)
    limit = _RMS**2 * low.shape[1] * 1.1
    for start in range(0, len(low), _CHUNK):
        part = low[start : start + _CHUNK]
        distance = squares[start : start + _CHUNK, None] + squares[None, start:] - 2 * part @ low[start:].T
        rows, columns = torch.nonzero(distance < limit, as_tuple=True)
        later = columns > rows
        yield rows[later] + start, columns[later] + start


def _verified(thumbs: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return which pairs really are near-duplicates, (number of pairs,), bool."""
    results = []
    for i, j in zip(rows.split(4096), columns.split(4096), strict=True):
        a, b = thumbs[i][:, None], thumbs[j][:, None]
        close = (a - b).square().mean((1, 2, 3)).sqrt() < _RMS
        coarse = _correlation(resize(a, (_LOW, _LOW)), resize(b, (_LOW, _LOW))) > _COARSE
        results.append(close & coarse & (_correlation(_detail(a), _detail(b)) > _FINE))
    return torch.cat(results)


def _detail(x: Tensor) -> Tensor:
    return x - F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.flatten(1), b.flatten(1)
    return F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True))


def _components(links: np.ndarray, count: int) -> Groups:
    """Return the connected groups of at least two, each sorted, in the order of their first members."""
    graph = coo_array((np.ones(len(links), bool), (links[:, 0], links[:, 1])), shape=(count, count))
    _, names = connected_components(graph, directed=False)
    members: dict[int, list[int]] = defaultdict(list)
    for index in np.unique(links).tolist():
        members[int(names[index])].append(index)
    return sorted(members.values())


# What it means


def _duplicates(data: ImageData, groups: Groups, kind: str, one: str, many: str) -> Iterator[Problem]:
    if not groups:
        return
    named = tuple(tuple(data.samples[i].id for i in group) for group in groups)
    count = sum(len(group) - 1 for group in groups)
    shown = spoken([" and ".join(group[:2]) for group in named])
    message = f"{counted(count, one, many)} among the images: {shown}"
    yield Problem(kind, message, tuple(sample for group in named for sample in group), "warning", named)


def _target_text(data: ImageData, index: int) -> str:
    target = data.samples[index].target
    if isinstance(target, int):
        return data.schema.classes[target]
    if isinstance(target, tuple) and data.schema.task == "multilabel":
        return "|".join(name for name, value in zip(data.schema.classes, target, strict=True) if value)
    return str(target)


def _conflicts(data: ImageData, exact: Groups) -> Iterator[Problem]:
    groups = [group for group in exact if len({data.samples[i].target for i in group}) > 1]
    if not groups:
        return
    shown = []
    for first, *others in groups:
        other = next(i for i in others if data.samples[i].target != data.samples[first].target)
        shown.append(" and ".join(f"{data.samples[i].id} ({_target_text(data, i)})" for i in (first, other)))
    named = tuple(tuple(data.samples[i].id for i in group) for group in groups)
    message = f"{counted(len(groups), 'image')} with different labels on identical copies: {spoken(shown)}"
    yield Problem("conflict", message, tuple(sample for group in named for sample in group), "warning", named)


def _leakage(data: ImageData, exact: Groups, similar: Groups) -> Iterator[Problem]:
    """Yield copies that span the splits that the data gives, and groups that do."""
    splits = [sample.split or "train" for sample in data.samples]
    if all(sample.split is None for sample in data.samples) or len(set(splits)) < 2:
        return
    links = [(group[0], other) for group in [*exact, *similar] for other in group[1:]]
    dropped: dict[tuple[str, str, str], list[tuple[int, list[int]]]] = defaultdict(list)
    twins = {index: number for number, group in enumerate(exact) for index in group}
    for group in _components(np.array(links).reshape(-1, 2), len(data)):
        present = {splits[i] for i in group}
        if len(present) > 1:
            keep = "train" if "train" in present else "test"
            kept = {twins.get(i, -1) for i in group if splits[i] == keep} - {-1}
            for i in group:
                if splits[i] != keep:
                    kind = "duplicate" if twins.get(i) in kept else "near-duplicate"
                    dropped[keep, splits[i], kind].append((i, group))
    for (keep, other, kind), found in sorted(dropped.items()):
        yield Problem(
            "leakage",
            f"{counted(len(found), f'{kind} spans', f'{kind}s span')} {keep} and {other}; kept in {keep} only",
            tuple(data.samples[i].id for i, _ in found),
            "warning",
            tuple(tuple(data.samples[k].id for k in group) for _, group in found),
        )
    spans: dict[str, set[str]] = defaultdict(set)
    for sample, split in zip(data.samples, splits, strict=True):
        if sample.group is not None:
            spans[sample.group].add(split)
    torn = sorted(group for group, present in spans.items() if len(present) > 1)
    if torn:
        message = f"{counted(len(torn), 'group')} in more than one of the given splits: {spoken(torn)}"
        yield Problem("group-leakage", message, tuple(torn))


def _counts(data: ImageData, indices: Iterable[int]) -> Counter[int]:
    counts: Counter[int] = Counter()
    for index in indices:
        target = data.samples[index].target
        if isinstance(target, int):
            counts[target] += 1
        elif isinstance(target, tuple):
            counts.update(c for c, value in enumerate(target) if value)
    return counts


def _classes(data: ImageData) -> Iterator[Problem]:
    names = data.schema.classes
    counts = _counts(data, range(len(data)))
    tiny = [f"{name} ({counts[c]})" for c, name in enumerate(names) if counts[c] < _TINY]
    if tiny:
        yield Problem(
            "tiny-class",
            f"{len(tiny)} of {len(names)} classes with fewer than {_TINY} images: {spoken(tiny)}",
            tuple(name for c, name in enumerate(names) if counts[c] < _TINY),
        )
    order = sorted(range(len(names)), key=lambda c: counts[c])
    if len(names) > 1 and counts[order[-1]] >= _UNBALANCED * max(1, counts[order[0]]):
        few, many = order[0], order[-1]
        ratio = counts[many] / max(1, counts[few])
        yield Problem(
            "imbalance",
            f"classes are unbalanced {ratio:.0f} to 1: {counted(counts[many], 'image')} of {names[many]}, "
            f"{counts[few]} of {names[few]}",
            (names[few], names[many]),
        )
    if any(sample.split for sample in data.samples):
        taught = _counts(data, (i for i, s in enumerate(data.samples) if s.split in (None, "train")))
        missing = [name for c, name in enumerate(names) if counts[c] and not taught[c]]
        if missing and taught:
            message = (
                f"{counted(len(missing), 'class', 'classes')} without training images: {spoken(missing)}"
            )
            yield Problem("class-missing", message, tuple(missing))
    for wrong, right in _typos(names, [counts[c] for c in range(len(names))]):
        yield Problem(
            "label-typo",
            f"class {names[wrong]} ({counted(counts[wrong], 'image')}) may be a misspelling of "
            f"{names[right]} ({counts[right]:,})",
            (names[wrong], names[right]),
        )


def _typos(names: Sequence[str], counts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield (rare class, frequent class) whose names differ by spelling only."""
    folded = [re.sub(r"[\W_]+", "", name.casefold()) for name in names]
    digits = [re.sub(r"\D+", " ", name) for name in names]
    order = sorted(range(len(names)), key=lambda c: counts[c])
    for place, rare in enumerate(order):
        for common in reversed(order[place + 1 :]):
            # Names that differ in a number (`class 1`, `class 2`) are meant to.
            if digits[rare] != digits[common] or not folded[rare]:
                continue
            if folded[rare] == folded[common] or (
                counts[rare] <= max(1, _RARE * counts[common]) and _alike(folded[rare], folded[common])
            ):
                yield rare, common
                break


def _alike(a: str, b: str) -> bool:
    if min(len(a), len(b)) < 3 or abs(len(a) - len(b)) > 2:
        return False
    # Letters in another order (`dgo`), or nearly the same letters in the same one.
    return (sorted(a) == sorted(b) and len(a) < 8) or difflib.SequenceMatcher(
        None, a, b, False
    ).ratio() >= 0.8
