"""The 400 papers: one record each, and the state that follows from code and committed results.

Nothing here imports torch, so that listing is instant.
"""

import functools
import json
import re
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from omniconv.core.errors import DataError, UsageError
from omniconv.papers.sources import fingerprint, locate, usage_of

__all__ = [
    "KINDS",
    "STATES",
    "Record",
    "State",
    "changed_files",
    "get_record",
    "load_records",
    "load_result",
    "result_path",
    "state",
    "usage",
]

RECORDS = Path(__file__).parent / "records"
RESULTS = Path(__file__).parent / "results"

State = Literal["open", "built", "works", "failed"]
STATES: tuple[State, ...] = ("works", "failed", "built", "open")
KINDS = (
    "backbone", "compress", "data", "deploy", "design", "inspect", "layer", "loss", "model", "op",
    "survey", "theory", "training",
)  # fmt: skip


@dataclass(frozen=True)
class Record:
    """What is known about one paper.

    Attributes:
        number: 1 to 400, the key everywhere.
        slug: short name.
        title: of the paper.
        authors: of the paper.
        year: of its first version, or None.
        arxiv: identifier such as `2201.03545`.
        code: address of the official code, or "".
        tier: 1 at the heart of convolution, 2 close, 3 far.
        kind: what it is, one of `KINDS`.
        home: where it lives, or will, below the package.
        keywords: terms by which it is searched.
        summary: our own two sentences.
        claims: published figures that must come out.
        implements: dotted names of the places that define it; none while the paper is open.
        check: module in `omniconv/papers/checks` that tests its central claim, or "".
        deviations: where the implementation or the check differs from the paper, and why.
        usage: Python that shows its use, or "" to derive it from `implements`.
    """

    number: int
    slug: str
    title: str
    authors: tuple[str, ...]
    arxiv: str
    code: str
    tier: int
    kind: str
    home: str
    keywords: tuple[str, ...]
    summary: str
    claims: str
    implements: tuple[str, ...]
    check: str
    deviations: tuple[str, ...]
    usage: str
    year: int | None = None

    @property
    def url(self) -> str:
        """Address of the paper."""
        return f"https://arxiv.org/abs/{self.arxiv}"


_LISTS = ("authors", "keywords", "implements", "deviations")
_INTEGERS = ("number", "tier", "year")


def _parse(file: Path) -> Record:
    """Read one record; every fault is a DataError that names file, key and mend."""
    try:
        values: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DataError(f"cannot read {file}: {error}") from None
    known = [field.name for field in fields(Record)]
    for key in values:
        if key not in known:
            raise DataError(f"{file.name} has no key {key!r}; known keys: {', '.join(known)}")
    for key in known:
        if key not in values:
            if key == "year":
                continue
            raise DataError(f"{file.name} misses the key {key!r}")
        value = values[key]
        if key in _LISTS:
            good, wanted = (
                isinstance(value, list) and all(isinstance(v, str) for v in value),
                "list of strings",
            )
        elif key in _INTEGERS:
            good, wanted = type(value) is int, "whole number"
        else:
            good, wanted = isinstance(value, str), "string"
        if not good:
            raise DataError(f"{file.name}: {key} must be a {wanted}: got {value!r}")
        if isinstance(value, list):
            values[key] = tuple(value)
    record = Record(**values)
    faults = [
        (not re.fullmatch(r"[a-z0-9_]+", record.slug), "slug must be lower case letters, digits and _"),
        (file.name != f"{record.number:03d}_{record.slug}.toml", "file name must be NNN_slug.toml"),
        (record.kind not in KINDS, f"kind must be one of {', '.join(KINDS)}"),
        (record.tier not in (1, 2, 3), "tier must be 1, 2 or 3"),
        (not record.title or not record.summary, "title and summary must not be empty"),
        (not re.fullmatch(r"\w*", record.check), "check must be a module name"),
        (bool(record.check) and not record.implements, "check is named but implements is empty"),
    ]
    for wrong, message in faults:
        if wrong:
            raise DataError(f"{file.name}: {message}")
    return record


@functools.cache
def load_records(folder: Path = RECORDS) -> tuple[Record, ...]:
    """Return every record of a folder, by number.

    Raises:
        DataError: if a record is damaged, has unknown or missing keys, or shares number, slug or arXiv id.
    """
    records = sorted((_parse(file) for file in folder.glob("*.toml")), key=lambda record: record.number)
    for key in ("number", "slug", "arxiv"):
        seen: dict[Any, Record] = {}
        for record in records:
            value = getattr(record, key)
            if value in seen:
                raise DataError(f"{key} {value} is in the records of {seen[value].slug} and {record.slug}")
            seen[value] = record
    return tuple(records)


def get_record(key: int | str) -> Record:
    """Return the record with this number, slug or arXiv id (also as `arXiv:2201.03545v2` or an address).

    Raises:
        UsageError: if there is none; the message names the nearest slug.
    """
    text = str(key).strip().lower()
    arxiv = re.search(r"(\d{4}\.\d{4,5})(v\d+)?(\.pdf)?$", text)
    for record in load_records():
        if arxiv and record.arxiv == arxiv[1]:
            return record
        if not arxiv and (
            record.slug == text.replace("-", "_") or (text.isdigit() and record.number == int(text))
        ):
            return record
    # pydantic, which this import brings along, would double the time of every other call.
    from omniconv.core.config import closest

    hint = closest(text, [record.slug for record in load_records()])
    raise UsageError(f"no paper {str(key)!r}{hint or '; try: omniconv papers search ' + repr(text)}")


def result_path(record: Record) -> Path:
    """Return where the result of a paper's check is kept."""
    return RESULTS / f"{record.number:03d}.json"


def load_result(record: Record) -> dict[str, Any] | None:
    """Return what the paper's check measured last, or None if the check never ran.

    Raises:
        DataError: if the file is damaged.
    """
    path = result_path(record)
    if not record.check or not path.exists():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        # A result of a check that the record no longer names is no evidence for it.
        return result if result["check"] == record.check else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}); run: omniconv papers check {record.slug}") from None


def state(record: Record) -> State:
    """Return what the paper is here, derived from the code and the committed result.

    `open`: nothing implements it. `built`: every name in `implements` exists. `works`: and its check passed,
    on code whose fingerprint the result holds. `failed`: and its check did not pass.
    """
    if not record.implements or any(locate(name) is None for name in record.implements):
        return "open"
    result = load_result(record)
    if result is None:
        return "built"
    if not result["passed"]:
        return "failed"
    return "works" if result.get("code") else "built"


def changed_files(record: Record) -> list[str]:
    """Return the files, relative to the package, that changed since the paper's check ran last.

    A stale result keeps its state; `omniconv papers check --changed` renews it. Empty without a result.
    """
    result = load_result(record)
    if result is None:
        return []
    then, now = result.get("code", {}), fingerprint(record.check, record.implements)
    return sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))


def usage(record: Record) -> str:
    """Return Python that shows how the paper is used here ("" while it is open)."""
    if state(record) == "open":
        return ""
    return record.usage.strip() or usage_of(record.implements[0])
