"""Pictures in folders: class folders with or without splits, and folders without labels."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from omniconv.core.errors import DataError, UsageError
from omniconv.data.decode import EXTENSIONS
from omniconv.data.schema import Problem, Sample, Split, Task, counted, printable, spoken
from omniconv.data.sources.base import FileImages, ordered_classes, split_name

__all__ = ["Listing", "list_pictures", "open_folder"]

_JUNK = {"__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin"}


@dataclass
class Listing:
    """What a data folder holds.

    Attributes:
        pictures: paths relative to the folder of all files with the suffix of a picture, sorted.
        others: other files.
        hidden: how many hidden files, folders and leftovers of operating systems were passed over.
        links: links that lead out of the folder or to a folder, which are not followed.
    """

    pictures: list[PurePosixPath] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    hidden: int = 0
    links: list[str] = field(default_factory=list)

    def problems(self) -> Iterator[Problem]:
        """Yield what a person should know about files that were not used."""
        if self.links:
            yield Problem(
                "link",
                f"did not follow {counted(len(self.links), 'link')} out of the folder or to folders: "
                f"{spoken(self.links)}",
                tuple(self.links),
            )
        if self.others:
            yield Problem(
                "ignored",
                f"ignored {counted(len(self.others), 'file')} other than pictures: {spoken(self.others)}",
                tuple(self.others),
                "info",
            )
        if self.hidden:
            yield Problem(
                "ignored",
                f"ignored {counted(self.hidden, 'hidden file or folder', 'hidden files and folders')}",
                (),
                "info",
            )


def list_pictures(root: Path) -> Listing:
    """Return what is in a folder and all folders below it.

    Raises:
        DataError: if a folder cannot be listed.
    """
    found = Listing()
    real = root.resolve()
    pending = [PurePosixPath()]
    while pending:
        inner = pending.pop()
        try:
            with os.scandir(root / inner) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            where = printable(str(root / inner))
            raise DataError(f"cannot list {where}: {(error.strerror or str(error)).lower()}") from None
        for entry in listed:
            path = inner / entry.name
            if entry.name.startswith(".") or entry.name.casefold() in _JUNK:
                found.hidden += 1
                continue
            if entry.is_symlink():
                target = Path(os.path.realpath(entry.path))
                if not target.is_relative_to(real) or target.is_dir():
                    found.links.append(printable(str(path)))
                    continue
            if entry.is_dir():
                pending.append(path)
            elif path.suffix.lower() in EXTENSIONS:
                found.pictures.append(path)
            else:
                found.others.append(printable(str(path)))
    found.pictures.sort()
    found.others.sort()
    return found


def _descend(pictures: list[PurePosixPath]) -> PurePosixPath:
    """Return the folder in which the structure begins: single wrapping folders are passed."""
    base = PurePosixPath()
    while True:
        depth = len(base.parts)
        inner = {path.parts[depth] if len(path.parts) > depth + 1 else None for path in pictures}
        only = next(iter(inner))
        deeper = [path for path in pictures if len(path.parts) > depth + 2]
        if len(inner) > 1 or only is None or len(deeper) < len(pictures):
            return base
        base = base / only


def _given_splits(parts: list[tuple[str, ...]]) -> bool:
    """Whether the first folders are splits rather than classes.

    They are if all of them are named like splits, or if at least two are and both hold folders; so classes
    called `train`, `bus` and `car` stay classes.
    """
    firsts = {p[0] for p in parts if len(p) > 1}
    named = {first for first in firsts if split_name(first)}
    if not named:
        return False
    if named == firsts:
        return True
    with_folders = {split_name(p[0]) for p in parts if len(p) > 2 and p[0] in named}
    return len(with_folders) >= 2


def open_folder(root: Path, task: Task | None) -> FileImages:
    """Return the pictures below a folder, labelled by class folders if there are at least two.

    A class is the first folder below the root or below its split; deeper folders count to it. Splits may also
    be folders inside every class. Pictures outside of class folders are left out with a mention.

    Raises:
        DataError: if there is no picture, a folder cannot be listed, or the task needs labels and has none.
        UsageError: if the task is one that class folders cannot give.
    """
    if task in ("multilabel", "regression"):
        raise UsageError(f"{root}: class folders cannot give a {task}; give --labels FILE")
    listing = list_pictures(root)
    problems = list(listing.problems())
    name = printable(root.resolve().name or str(root))
    if not listing.pictures:
        hint = "; " + problems[0].message if problems else ""
        raise DataError(f"{root}: no pictures ({', '.join(sorted(EXTENSIONS))}){hint}")
    if task != "none":
        labelled = _labelled(listing.pictures, problems)
        if labelled is not None:
            paths, labels, splits = labelled
            classes = ordered_classes(labels)
            index = {label: i for i, label in enumerate(classes)}
            samples = [
                Sample(printable(str(path)), index[label], None, split)
                for path, label, split in zip(paths, labels, splits, strict=True)
            ]
            shown = tuple(printable(label) for label in classes)
            return FileImages(
                name, root, [root / p for p in paths], samples, "classification", shown, problems
            )
        if task is not None:
            raise DataError(
                f"{name}/: {counted(len(listing.pictures), 'image')}, no labels; give --labels FILE"
            )
    samples = [Sample(printable(str(path))) for path in listing.pictures]
    return FileImages(name, root, [root / p for p in listing.pictures], samples, "none", (), problems)


def _labelled(
    pictures: list[PurePosixPath], problems: list[Problem]
) -> tuple[list[PurePosixPath], list[str], list[Split | None]] | None:
    """Return (paths, labels, splits) of pictures in class folders, or None if there are no two classes."""
    depth = len(_descend(pictures).parts)
    parts = [path.parts[depth:] for path in pictures]
    outer = _given_splits(parts)
    paths: list[PurePosixPath] = []
    labels: list[str] = []
    splits: list[Split | None] = []
    stray: list[str] = []
    nested = False
    for path, part in zip(pictures, parts, strict=True):
        split = split_name(part[0]) if outer and len(part) > 1 else None
        if outer:
            part = part[1:] if split else ()
        if len(part) < 2:
            stray.append(printable(str(path)))
            continue
        paths.append(path)
        labels.append(part[0])
        splits.append(split)
        nested = nested or len(part) > 2
    if len(set(labels)) < 2:
        return None
    if not outer:
        # class/train/1.jpg
        inner: list[Split | None] = [
            split_name(path.parts[depth + 1]) if len(path.parts) > depth + 2 else None for path in paths
        ]
        if all(inner):
            splits, nested = inner, any(len(path.parts) > depth + 3 for path in paths)
    if stray:
        problems.append(
            Problem(
                "unlabelled",
                f"left out {counted(len(stray), 'picture')} outside of the class folders: {spoken(stray)}",
                tuple(stray),
            )
        )
    if nested:
        problems.append(
            Problem("nested", "pictures in deeper folders count to the class of the first folder", (), "info")
        )
    return paths, labels, splits
