"""Open whatever people keep images in."""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path

from omniconv.core.errors import DataError, UsageError
from omniconv.data.decode import EXTENSIONS
from omniconv.data.schema import Problem, Sample, Task, printable
from omniconv.data.sources.arrays import find_idx, open_digits, open_idx, open_npz
from omniconv.data.sources.base import ArrayImages, FileImages, ImageData
from omniconv.data.sources.folder import open_folder
from omniconv.data.sources.table import TABLES, find_table, open_table

__all__ = ["ArrayImages", "FileImages", "ImageData", "open_images"]

_TASKS = ("classification", "multilabel", "regression", "none")
_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".xz", ".7z", ".rar", ".bz2")


def open_images(
    path: str | os.PathLike[str],
    *,
    labels: str | os.PathLike[str] | None = None,
    task: Task | None = None,
    target: str | Sequence[str] | None = None,
    group: str | None = None,
) -> ImageData:
    """Open a set of images, whatever it is kept in; nothing is ever written there.

    In this order: `labels` with a folder of pictures; a table (CSV, TSV, Parquet) of paths and labels; an NPZ
    file; a single picture; a folder with IDX files, with labels.csv (or .tsv, .parquet, metadata.csv) and
    pictures, with class folders (below train, val and test, or not), or with pictures alone; and "digits",
    the 1,797 digits of scikit-learn, if there is no file or folder of that name.

    Args:
        path: a folder or a file.
        labels: a table of labels for the pictures in the folder `path`, relative to the working directory or
            to the folder.
        task: what the labels are for; guessed by default, and what was guessed is among the problems. "none"
            leaves labels aside.
        target: the column or columns of labels in a table; guessed by default.
        group: a column of the table: samples with the same value stay in one split.

    Raises:
        DataError: if there is nothing that can be opened; the message names the file or row.
        UsageError: if the arguments do not fit what is there.
        ResourceError: if an optional package is needed that is missing.
    """
    shown = printable(os.fspath(path))
    if task is not None and task not in _TASKS:
        raise UsageError(f"task must be one of {', '.join(_TASKS)}: got {task!r}")
    columns = [target] if isinstance(target, str) else target
    root = Path(path)
    try:
        there = root.exists()
    except (OSError, ValueError) as error:
        raise DataError(f"cannot open {shown}: {error}") from None
    if not there:
        if shown == "digits":
            _only_tables(shown, labels, columns, group)
            return open_digits()
        raise DataError(f"no file or folder {shown}{_similar(root)}")
    if labels is not None:
        if not root.is_dir():
            raise UsageError(f"labels belong to a folder of pictures; {shown} is a file")
        return open_table(
            _labels_file(labels, root), root, task=task, target=columns, group=group, strays=True
        )
    if root.is_file():
        if root.suffix.lower() in TABLES:
            return open_table(root, root.parent, task=task, target=columns, group=group)
        _only_tables(shown, labels, columns, group)
        return _open_file(root, shown, task)
    if not root.is_dir():
        raise DataError(f"{shown} is neither a file nor a folder")
    try:
        if find_idx(root):
            _only_tables(shown, labels, columns, group)
            return open_idx(root, task)
        table = find_table(root)
    except OSError as error:
        raise DataError(f"cannot list {shown}: {(error.strerror or str(error)).lower()}") from None
    if table is not None and task != "none":
        return open_table(table, root, task=task, target=columns, group=group, strays=True)
    _only_tables(shown, labels, columns, group)
    arrays = sorted(root.glob("*.npz"))
    if len(arrays) == 1 and not any(entry.is_dir() for entry in root.iterdir()):
        return open_npz(arrays[0], task)
    data = open_folder(root, task)
    if data.schema.task == "none" and task is None:
        tables = sorted(entry.name for entry in root.iterdir() if entry.suffix.lower() in TABLES)
        if tables:
            message = (
                f"{printable(tables[0])} may hold labels; to use it, give --labels {printable(tables[0])}"
            )
            data.problems.append(Problem("hint", message, (), "info"))
    return data


def _open_file(root: Path, shown: str, task: Task | None) -> ImageData:
    suffix = root.suffix.lower()
    if suffix == ".npz":
        return open_npz(root, task)
    if suffix in EXTENSIONS:
        if task not in (None, "none"):
            raise DataError(f"{shown}: 1 image, no labels; give a folder or a table")
        return FileImages(printable(root.name), root, [root], [Sample(printable(root.name))], "none", (), [])
    if suffix in _ARCHIVES:
        raise DataError(f"{shown} is an archive; unpack it and give the folder")
    raise DataError(f"{shown} is no picture, table or array that omniconv reads")


def _only_tables(shown: str, labels: object, target: object, group: object) -> None:
    if labels is not None:
        raise UsageError(f"{shown} has its own labels; labels belong to a folder of pictures")
    for name, value in (("target", target), ("group", group)):
        if value is not None:
            raise UsageError(f"{name} names a column of a table, and {shown} has none; give --labels FILE")


def _labels_file(labels: str | os.PathLike[str], root: Path) -> Path:
    shown = printable(os.fspath(labels))
    try:
        for candidate in (Path(labels), root / labels):
            if candidate.is_file():
                return candidate
    except (OSError, ValueError) as error:
        raise DataError(f"cannot open {shown}: {error}") from None
    raise DataError(f"no file {shown} with labels")


def _similar(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {printable(str(path.parent / close[0]))}?" if close else ""
