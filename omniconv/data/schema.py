"""What a set of images is: its schema, its samples, and the problems found in it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["Problem", "Sample", "Schema", "Split", "Target", "Task", "counted", "printable", "spoken"]

Task = Literal["classification", "multilabel", "regression", "none"]
Split = Literal["train", "val", "test"]
Target = int | tuple[float, ...] | None


@dataclass(frozen=True)
class Schema:
    """What every sample of a set has in common.

    Attributes:
        modality: always "image".
        task: what the targets are for; "none" if there are no labels.
        classes: class names; the names of the target columns for a regression.
        channels: channels of every image as it is read.
        low: pixel value that means black: 0 for integer data, the smallest one for float data.
        high: pixel value that means white: 255 (8 bit), 65535 (16 bit), or the largest one of float data.
        height: median height in pixels.
        width: median width in pixels.
    """

    task: Task
    classes: tuple[str, ...]
    channels: int
    low: float
    high: float
    height: int
    width: int
    modality: str = "image"


@dataclass(frozen=True)
class Sample:
    """One image and what is known about it.

    Attributes:
        id: `printable` path relative to the data folder with "/" separators, or "train/17" in an array.
        target: class index, multi-hot or regression values, or None without labels.
        group: samples of one group (a patient, a place) never go to different splits.
        split: the split that the data itself names.
    """

    id: str
    target: Target = None
    group: str | None = None
    split: Split | None = None


@dataclass(frozen=True)
class Problem:
    """Something about the data that a person should know.

    Attributes:
        kind: one word, such as "unreadable", "duplicate" or "imbalance".
        message: one sentence for people.
        ids: the samples (or files) concerned.
        severity: "error" stops a training, "warning" may spoil one, "info" is good to know.
        groups: for duplicates, which ids belong together.
    """

    kind: str
    message: str
    ids: tuple[str, ...] = ()
    severity: Literal["error", "warning", "info"] = "warning"
    groups: tuple[tuple[str, ...], ...] = ()


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return `1 image`, `2 images`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def spoken(names: Sequence[str], limit: int = 3) -> str:
    """Return the first names of a list for a message: `a, b, c and 4 more`."""
    rest = len(names) - limit
    return ", ".join(names) if rest <= 0 else f"{', '.join(names[:limit])} and {rest:,} more"


def printable(name: str) -> str:
    r"""Return a file name that can be shown and stored: control characters and stray bytes are escaped.

    Two different names never become the same: the backslash itself is escaped, too.
    """
    if name.isprintable() and "\\" not in name:
        return name
    return "".join(map(_escape, name))


def _escape(char: str) -> str:
    code = ord(char)
    if char == "\\":
        return "\\\\"
    if 0xDC80 <= code <= 0xDCFF:  # how Python decodes bytes that are not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if char.isprintable():
        return char
    return _CONTROL.get(char, f"\\u{code:04x}")


_CONTROL = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
