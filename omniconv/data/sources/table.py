"""A CSV, TSV or Parquet file of paths and labels."""

import csv
import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from omniconv.core.config import closest
from omniconv.core.errors import DataError, ResourceError, UsageError
from omniconv.data.decode import EXTENSIONS
from omniconv.data.schema import Problem, Sample, Split, Target, Task, counted, printable, spoken
from omniconv.data.sources.base import FileImages, split_name
from omniconv.data.sources.folder import Listing, list_pictures
from omniconv.data.sources.targets import Labels, is_switch, one_column, several_columns

__all__ = ["TABLES", "find_table", "open_table"]

TABLES = (".csv", ".tsv", ".parquet")
_NAMES = ("labels", "metadata")  # a table of this name in a folder of pictures holds their labels
_PATHS = (
    "path filepath imagepath file filename imagefile imagefilename image imagename img picture photo "
    "imageid imageindex id name"
).split()
_LABELS = (
    "label labels class classes target targets category categories classname classid labelname "
    "findinglabels findings diagnosis dx species breed tag tags"
).split()
_SPLIT_COLUMNS = ("split", "subset", "partition", "set")
_MOST_TABLE_BYTES = 4 << 30


@dataclass
class _Table:
    name: str
    columns: dict[str, list[str]]
    lines: list[int]

    def where(self, row: int) -> str:
        """Say where a row stands."""
        return f"{self.name} line {self.lines[row]}"

    def __len__(self) -> int:
        return len(self.lines)


def find_table(folder: Path) -> Path | None:
    """Return the table of labels in a folder of pictures: labels.csv, .tsv or .parquet, or metadata.csv."""
    for stem in _NAMES:
        for suffix in TABLES:
            if (path := folder / f"{stem}{suffix}").is_file():
                return path
    return None


def _plain(word: str) -> str:
    return re.sub(r"[^0-9a-z]", "", word.casefold())


def _is_picture(cell: str) -> bool:
    return PurePosixPath(cell.strip()).suffix.lower() in EXTENSIONS


# Reading


def _read_text(path: Path, name: str) -> str:
    try:
        if path.stat().st_size > _MOST_TABLE_BYTES:
            raise DataError(f"{name} is larger than 4 GiB; split it, or store it as Parquet")
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{name} is unreadable: {(error.strerror or str(error)).lower()}") from None
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        try:
            return content.decode("utf-16")
        except UnicodeDecodeError:
            raise DataError(
                f"{name} is unreadable: it begins like UTF-16 text and goes on otherwise"
            ) from None
    # Bytes that are not UTF-8 stay what they are, as in file names.
    return content.decode("utf-8-sig", "surrogateescape")


def _read_csv(path: Path, name: str) -> _Table:
    text = _read_text(path, name)
    first = text.split("\n", 1)[0]
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[list[str]] = []
    lines: list[int] = []
    line = 1
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                rows.append(row)
                lines.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{name} line {line} is unreadable: {error}") from None
    if not rows:
        raise DataError(f"{name} is empty; it must have a header and one line an image")
    header = [cell.strip() for cell in rows[0]]
    if any(map(_is_picture, header)):
        header = _invent_header(header, name)
    else:
        rows, lines = rows[1:], lines[1:]
    for row, number in zip(rows, lines, strict=True):
        if len(row) != len(header):
            raise DataError(f"{name} line {number} has {len(row)} cells where the header has {len(header)}")
    doubled = sorted({column for column in header if header.count(column) > 1})
    if doubled:
        raise DataError(f"{name} has two columns called {printable(doubled[0])!r}; rename one")
    if not rows:
        raise DataError(f"{name} has a header and no lines")
    return _Table(name, {column: [row[i] for row in rows] for i, column in enumerate(header)}, lines)


def _invent_header(first: list[str], name: str) -> list[str]:
    pictures = [i for i, cell in enumerate(first) if _is_picture(cell)]
    if len(first) > 2 or len(pictures) > 1:
        raise DataError(f"{name} has no header; its first line must name the columns, such as path,label")
    return ["path" if i in pictures else "label" for i in range(len(first))]


def _cell(value: Any) -> str:
    if value is None or value != value:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return os.fsdecode(value)
    if isinstance(value, Iterable):
        return "|".join(map(_cell, value))
    return str(value)


def _read_parquet(path: Path, name: str) -> _Table:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ResourceError(
            "Parquet needs pyarrow; install it with: pip install 'omniconv[tables]'"
        ) from None
    try:
        table = parquet.read_table(path)
        columns = {
            str(column): [_cell(value) for value in table[column].to_pylist()]
            for column in table.column_names
        }
    except Exception as error:  # damaged files make pyarrow fail in many ways
        raise DataError(f"{name} is unreadable: {printable(' '.join(str(error).split())[:200])}") from None
    if not table.num_rows:
        raise DataError(f"{name} has no rows")
    return _Table(name, columns, list(range(1, table.num_rows + 1)))


# Columns


def _column(table: _Table, wanted: str, role: str) -> str:
    if wanted not in table.columns:
        known = list(table.columns)
        raise UsageError(
            f"{table.name} has no column {wanted!r} for the {role}{closest(wanted, known)}"
            f" (columns: {', '.join(map(printable, known))})"
        )
    return wanted


def _guess(columns: Iterable[str], names: Sequence[str]) -> str | None:
    plain = {_plain(column): column for column in columns}
    return next((plain[name] for name in names if name in plain), None)


def _path_column(table: _Table) -> str:
    pictures = [
        column for column, cells in table.columns.items() if sum(map(_is_picture, cells)) > len(cells) / 2
    ]
    if len(pictures) == 1:
        return pictures[0]
    guess = _guess(pictures or table.columns, _PATHS)
    if guess is None:
        shown = ", ".join(map(printable, table.columns))
        raise DataError(f"{table.name} has no column of image files (columns: {shown}); call it path")
    return guess


def _splits(table: _Table) -> tuple[str | None, list[Split | None]]:
    none: list[Split | None] = [None] * len(table)
    for wanted in _SPLIT_COLUMNS:
        column = _guess(table.columns, [wanted])
        if column is None:
            continue
        cells = table.columns[column]
        found: list[Split | None] = [split_name(cell) for cell in cells]
        wrong = [
            i for i, (cell, split) in enumerate(zip(cells, found, strict=True)) if cell.strip() and not split
        ]
        if not wrong:
            return column, found
        if wanted == "split":
            cell = printable(cells[wrong[0]])
            raise DataError(f"{table.where(wrong[0])}: {column} must be train, val or test, got {cell!r}")
    return None, none


def _labels(
    table: _Table, taken: set[str], task: Task | None, target: Sequence[str] | None, problems: list[Problem]
) -> Labels | None:
    """Return the labels, or None if the table has no column for them."""
    if target is not None:
        names = [_column(table, name, "target") for name in target]
    else:
        rest = [column for column in table.columns if column not in taken]
        guess = _guess(rest, _LABELS)
        switches = [column for column in rest if is_switch(table.columns[column])]
        if guess is not None:
            names = [guess]
        elif len(rest) <= 1:
            names = rest
        elif len(switches) > 1:
            names = switches
        else:
            shown = ", ".join(map(printable, rest))
            raise UsageError(f"{table.name} has several columns ({shown}); name the label with --target")
    if not names:
        return None
    unused = [printable(column) for column in table.columns if column not in {*names, *taken}]
    if target is None and unused:
        message = f"labels are taken from {spoken(list(map(printable, names)))}; not used: {spoken(unused)}"
        problems.append(Problem("guess", message, (), "info"))
    if len(names) == 1:
        return one_column(names[0], table.columns[names[0]], task, table.where)
    return several_columns({name: table.columns[name] for name in names}, task, table.where)


# Paths


class _Finder:
    """Turns the paths in a table into files of the data folder."""

    def __init__(self, table: _Table, root: Path) -> None:
        self.table, self.root = table, root
        self.real = os.path.realpath(root)
        self._listing: Listing | None = None
        self._by_name: dict[str, list[PurePosixPath]] = {}

    @property
    def listing(self) -> Listing:
        """Everything in the folder; listed when first needed."""
        if self._listing is None:
            self._listing = list_pictures(self.root)
            for path in self._listing.pictures:
                for key in {path.name, path.stem}:
                    self._by_name.setdefault(key, []).append(path)
        return self._listing

    def find(self, row: int, cell: str) -> PurePosixPath:
        """Return the path of a cell relative to the folder; a file that is not there keeps its name.

        Raises:
            DataError: if the path is empty, leads out of the folder, or fits several files.
        """
        where = self.table.where(row)
        if not cell.strip() or "\0" in cell:
            raise DataError(f"{where} names no image file")
        inner = self._inside(where, cell)
        if self._exists(inner):
            return inner
        for other in {cell.strip(), cell.strip().replace("\\", "/")} - {cell}:
            if self._exists(candidate := self._inside(where, other)):
                return candidate
        # Tables often name files without their folder or without their suffix.
        self.listing  # noqa: B018 (fills the table of names)
        matches = self._by_name.get(inner.name, [])
        if len(inner.parts) == 1 and len(matches) > 1:
            raise DataError(
                f"{where}: {printable(cell)!r} may be {spoken([printable(str(m)) for m in matches])}; "
                "give the folder, too"
            )
        matches = [path for path in matches if path.parts[-len(inner.parts) : -1] == inner.parts[:-1]]
        return matches[0] if len(matches) == 1 else inner

    def _exists(self, inner: PurePosixPath) -> bool:
        try:
            return (self.root / inner).is_file()
        except OSError:  # a name that is too long is no file
            return False

    def _inside(self, where: str, cell: str) -> PurePosixPath:
        path = os.path.normpath(cell)
        if os.path.isabs(path):
            base = next(
                (b for b in (os.path.abspath(self.root), self.real) if path.startswith(b + os.sep)), None
            )
            path = os.path.relpath(path, base) if base else os.pardir
        try:
            out = not os.path.realpath(os.path.join(self.real, path)).startswith(self.real + os.sep)
        except OSError:
            out = False
        if out or path.split(os.sep)[0] == os.pardir:
            raise DataError(
                f"{where}: {printable(cell)!r} leads out of {printable(str(self.root))}; "
                "move the file into the folder"
            )
        return PurePosixPath(Path(path).as_posix())


def open_table(
    table_path: Path,
    root: Path,
    *,
    task: Task | None = None,
    target: Sequence[str] | None = None,
    group: str | None = None,
    strays: bool = False,
) -> FileImages:
    """Return the images that a table names.

    Args:
        table_path: a CSV, TSV or Parquet file.
        root: the folder to which paths are relative, and which they must not leave.
        task: what the labels are for; guessed by default.
        target: the columns of labels; guessed by default.
        group: the column whose values keep samples together in splits.
        strays: whether to mention pictures of the folder that the table does not name.

    Raises:
        DataError: if the table is damaged, names a file outside of the folder, or a cell does not fit.
        UsageError: if a column does not exist or cannot be guessed.
    """
    name = printable(table_path.name)
    suffix = table_path.suffix.lower()
    if suffix not in TABLES:
        raise UsageError(f"{name} is no table of labels; give a file ending in {', '.join(TABLES)}")
    table = _read_parquet(table_path, name) if suffix == ".parquet" else _read_csv(table_path, name)
    paths = _path_column(table)
    split_column, splits = _splits(table)
    groups: Sequence[str | None] = [None] * len(table)
    taken = {paths} | ({split_column} if split_column else set())
    if group is not None:
        groups = [cell.strip() or None for cell in table.columns[_column(table, group, "group")]]
        taken.add(group)
    problems: list[Problem] = []
    labels = None if task == "none" else _labels(table, taken, task, target, problems)
    if labels is None:
        if task not in (None, "none"):
            raise DataError(f"{name} has no column of labels; name it with --target")
        labels = Labels("none", (), [None] * len(table))
    finder = _Finder(table, root)
    found = [finder.find(row, cell) for row, cell in enumerate(table.columns[paths])]
    if labels.note:
        problems.append(Problem("guess", labels.note, (), "info"))
    rows = _rows(table, found, labels, splits, groups, problems)
    if strays:
        if (own := printable(os.path.relpath(table_path, root))) in finder.listing.others:
            finder.listing.others.remove(own)
        problems += finder.listing.problems()
        named = set(rows)
        rest = [printable(str(path)) for path in finder.listing.pictures if path not in named]
        if rest:
            message = f"left out {counted(len(rest), 'picture')} without a line in {name}: {spoken(rest)}"
            problems.append(Problem("unlabelled", message, tuple(rest)))
    shown = printable(root.resolve().name if strays else table_path.stem)
    source = root if strays else table_path
    files = [root / path for path in rows]
    return FileImages(shown, source, files, list(rows.values()), labels.task, labels.classes, problems)


def _rows(
    table: _Table,
    found: list[PurePosixPath],
    labels: Labels,
    splits: Sequence[Split | None],
    groups: Sequence[str | None],
    problems: list[Problem],
) -> Mapping[PurePosixPath, Sample]:
    """Return one sample a file; rows without a label are left out and mentioned."""
    rows: dict[PurePosixPath, Sample] = {}
    first: dict[PurePosixPath, int] = {}
    unlabelled: list[str] = []
    doubled: list[str] = []
    for row, path in enumerate(found):
        shown, target = printable(str(path)), labels.targets[row]
        if target is None and labels.task != "none":
            unlabelled.append(shown)
            continue
        sample = Sample(shown, target, groups[row], splits[row])
        if path in rows:
            old = rows[path]
            if labels.task == "multilabel":
                target = _union(old.target, target)
            elif old.target != target:
                raise DataError(
                    f"{table.where(row)} and line {table.lines[first[path]]} give {shown} different labels; "
                    "delete one, or give --task multilabel if an image may have several"
                )
            if (old.split, old.group) != (sample.split, sample.group):
                raise DataError(
                    f"{table.where(row)} and line {table.lines[first[path]]} put {shown} into different splits "
                    "or groups; delete one"
                )
            doubled.append(shown)
            sample = Sample(shown, target, sample.group, sample.split)
        rows[path] = sample
        first.setdefault(path, row)
    if unlabelled:
        message = f"left out {counted(len(unlabelled), 'image')} without a label in {table.name}: {spoken(unlabelled)}"
        problems.append(Problem("unlabelled", message, tuple(unlabelled)))
    if doubled:
        message = f"{counted(len(doubled), 'line')} of {table.name} for images that had one before: {spoken(doubled)}"
        problems.append(Problem("repeated", message, tuple(doubled), "info"))
    if not rows:
        raise DataError(f"{table.name} labels no image")
    return rows


def _union(first: Target, second: Target) -> Target:
    assert isinstance(first, tuple)
    assert isinstance(second, tuple)
    return tuple(map(max, first, second))
