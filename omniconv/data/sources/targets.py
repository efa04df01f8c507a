"""What the labels of a set mean: one class each, several, or numbers; guessed from the values unless told."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from omniconv.core.errors import DataError, UsageError
from omniconv.data.schema import Target, Task, printable
from omniconv.data.sources.base import ordered_classes

__all__ = ["Labels", "interpret", "is_switch", "one_column", "several_columns"]

_MISSING = {"", "nan", "na", "n/a", "none", "null"}
_SWITCH = {"0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0, "false": 0.0, "true": 1.0, "no": 0.0, "yes": 1.0}
_MANY_NUMBERS = 10  # distinct fractions that make a regression
_MANY_INTEGERS, _SAMPLES_EACH = 20, 4  # integers do so if there are many and each is rare

Where = Callable[[int], str]
"""Says where value number i stands, for messages: `labels.csv line 7`."""


@dataclass(frozen=True)
class Labels:
    """Targets of all samples; a sample without a label has None.

    Attributes:
        task: what they are for.
        classes: class names, or the names of the target columns of a regression.
        targets: one entry a sample.
        note: one sentence on what was guessed, if anything.
    """

    task: Task
    classes: tuple[str, ...]
    targets: list[Target]
    note: str = ""


def is_switch(values: Sequence[str]) -> bool:
    """Whether all values say yes or no (0 and 1, true and false)."""
    return all(value.strip().casefold() in _SWITCH for value in values)


def _number(value: str) -> float | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _separator(values: Sequence[str], task: Task | None) -> str | None:
    """Return what separates several labels in one cell, or None if cells hold one label each."""
    wanted = "|;, " if task == "multilabel" else "|;"
    for separator in wanted:
        if any(separator in value for value in values):
            return separator
    if task is None:
        # Spaces also stand within names. They separate labels if there are fewer words than combinations of
        # them, and combinations of different length: `clear`, `clear water`, `cloudy road water`.
        cells = {tuple(value.split()) for value in values}
        words = {word for cell in cells for word in cell}
        if len(words) < len(cells) and len({len(cell) for cell in cells if cell}) > 1:
            return " "
    return None


def interpret(values: Sequence[str], task: Task | None) -> Task:
    """Return the task that one column of labels is for."""
    if task is not None:
        return task
    if _separator(values, None):
        return "multilabel"
    numbers = [_number(value) for value in values]
    if numbers and all(number is not None for number in numbers):
        distinct = len(set(numbers))
        whole = all(number == int(number) for number in numbers if number is not None)
        if not whole and distinct > _MANY_NUMBERS:
            return "regression"
        if whole and distinct > _MANY_INTEGERS and len(values) < _SAMPLES_EACH * distinct:
            return "regression"
    return "classification"


def one_column(name: str, cells: Sequence[str], task: Task | None, where: Where) -> Labels:
    """Return the labels in one column of text.

    Raises:
        DataError: if a cell is not a number where the task is regression, or no sample has a label.
    """
    cells = [cell.strip() for cell in cells]
    filled = [cell for cell in cells if cell.casefold() not in _MISSING]
    if not filled:
        raise DataError(f"the column {printable(name)} is empty; name another one with --target")
    found = interpret(filled, task)
    if found == "regression":
        targets: list[Target] = []
        for i, cell in enumerate(cells):
            number = _number(cell)
            if number is None and cell.casefold() not in _MISSING:
                raise DataError(
                    f"{where(i)}: {printable(name)} must be a finite number, got {printable(cell)!r}"
                )
            targets.append(None if number is None else (number,))
        note = (
            f"{printable(name)} was read as a number to predict; if it is a class, give --task classification"
        )
        return Labels("regression", (printable(name),), targets, "" if task else note)
    if found == "multilabel":
        separator = _separator(filled, "multilabel" if task else None)
        sets = [_split(cell, separator) for cell in cells]
        classes = ordered_classes(label for labels in sets for label in labels)
        note = (
            f"{printable(name)} was split at {separator!r} into several labels an image; "
            "if it is one class, give --task classification"
        )
        hot: list[Target] = [tuple(float(label in labels) for label in classes) for labels in sets]
        return Labels("multilabel", tuple(map(printable, classes)), hot, "" if task else note)
    if all((number := _number(cell)) is not None and number == int(number) for cell in filled):
        # Tables that once had a gap write classes as 3.0.
        cells = [cell if cell.casefold() in _MISSING else str(int(float(cell))) for cell in cells]
        filled = [cell for cell in cells if cell.casefold() not in _MISSING]
    classes = ordered_classes(filled)
    index = {label: i for i, label in enumerate(classes)}
    return Labels("classification", tuple(map(printable, classes)), [index.get(cell) for cell in cells])


def _split(cell: str, separator: str | None) -> set[str]:
    if cell.casefold() in _MISSING:
        return set()
    parts = cell.split(separator) if separator else [cell]
    return {part.strip() for part in parts if part.strip()}


def several_columns(columns: Mapping[str, Sequence[str]], task: Task | None, where: Where) -> Labels:
    """Return the labels in several columns: 0 and 1 (one class or several an image), or numbers.

    Raises:
        DataError: if a cell does not fit.
        UsageError: if the columns hold neither 0 and 1 nor numbers.
    """
    names = tuple(map(printable, columns))
    switches = all(is_switch(values) for values in columns.values())
    if task != "regression" and switches:
        rows = [
            tuple(_SWITCH[cell.strip().casefold()] for cell in row)
            for row in zip(*columns.values(), strict=True)
        ]
        if task == "classification" or (task is None and all(sum(row) == 1 for row in rows)):
            for i, row in enumerate(rows):
                if sum(row) != 1:
                    raise DataError(f"{where(i)}: one of {', '.join(names)} must be 1, {int(sum(row))} are")
            note = "every line has exactly one 1 and so one class; if it may have several, give --task multilabel"
            return Labels("classification", names, [row.index(1.0) for row in rows], "" if task else note)
        return Labels("multilabel", names, list(rows))
    if task in ("multilabel", "classification"):
        for name, values in columns.items():
            for i, cell in enumerate(values):
                if cell.strip().casefold() not in _SWITCH:
                    raise DataError(f"{where(i)}: {printable(name)} must be 0 or 1, got {printable(cell)!r}")
    targets: list[Target] = []
    for i, row in enumerate(zip(*columns.values(), strict=True)):
        numbers = [_number(cell) for cell in row]
        for name, cell, number in zip(names, row, numbers, strict=True):
            if number is None and cell.strip().casefold() not in _MISSING:
                if task is None:
                    raise UsageError(
                        f"{where(i)}: target columns must hold 0 and 1, or numbers; {name} has {printable(cell)!r}"
                    )
                raise DataError(f"{where(i)}: {name} must be a finite number, got {printable(cell)!r}")
        complete = [number for number in numbers if number is not None]
        targets.append(tuple(complete) if len(complete) == len(numbers) else None)
    return Labels("regression", names, targets)
