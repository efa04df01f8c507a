"""The papers' part of README.md, generated from records and results: `python -m omniconv.papers.readme`."""

from collections import Counter
from pathlib import Path

from omniconv.core.errors import UsageError
from omniconv.core.files import atomic_write
from omniconv.papers.records import KINDS, STATES, Record, load_records, load_result, state

__all__ = ["insert", "render", "update"]

BEGIN, END = "<!-- papers:begin -->", "<!-- papers:end -->"
README = Path(__file__).resolve().parents[2] / "README.md"


def _row(record: Record) -> str:
    result = load_result(record)
    assert result is not None
    parts = result["requirements"]
    held = sum(part["passed"] for part in parts)
    names = ", ".join(f"`{name.rpartition('.')[2]}`" for name in record.implements)
    title = record.title.replace("|", r"\|")
    return f"| {record.number} | [{title}]({record.url}) | {record.kind} | {names} | {held} of {len(parts)} hold |"


def _table(records: list[Record]) -> list[str]:
    head = ["| no | paper | kind | here as | parts of its claim |", "| -: | - | - | - | - |"]
    return [*head, *map(_row, records)]


def render() -> str:
    """Return the counts by kind and state, and the papers that work or whose claim failed, as Markdown."""
    records = load_records()
    by_state = {s: [record for record in records if state(record) == s] for s in STATES}
    counts = Counter((record.kind, s) for s, those in by_state.items() for record in those)
    lines = [f"| kind | {' | '.join(STATES)} | papers |", f"| - |{' -: |' * (len(STATES) + 1)}"]
    for kind in KINDS:
        row = [counts[kind, s] for s in STATES]
        lines.append(f"| {kind} | {' | '.join(str(n or '') for n in row)} | {sum(row)} |")
    totals = [f"**{len(by_state[s])}**" for s in STATES]
    lines.append(f"| **all** | {' | '.join(totals)} | **{len(records)}** |")
    if by_state["works"]:
        lines += ["", "Papers whose claim was measured here and holds:", "", *_table(by_state["works"])]
    if by_state["failed"]:
        lines += ["", "Papers of whose claim a part did not hold here:", "", *_table(by_state["failed"])]
    return "\n".join(lines)


def insert(text: str) -> str:
    """Return a README's text with the part between the markers renewed.

    Raises:
        UsageError: if the markers are missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UsageError(f"README.md must hold the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{render()}\n{END}{after}"


def update(path: Path = README) -> None:
    """Renew the papers' part of a README on disk.

    Raises:
        UsageError: if there is no README there, as in an installed package.
    """
    if not path.exists():
        raise UsageError(f"no {path}; run this in a clone of the repository")
    atomic_write(path, insert(path.read_text(encoding="utf-8")))


if __name__ == "__main__":
    update()
