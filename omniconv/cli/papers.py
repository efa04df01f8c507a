"""`omniconv papers`: what each paper is here, how to use it, and the evidence that it works."""

import json
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from omniconv.core.errors import UsageError
from omniconv.papers.records import (
    KINDS,
    STATES,
    Record,
    changed_files,
    get_record,
    load_records,
    load_result,
    state,
    usage,
)

if TYPE_CHECKING:
    from omniconv.papers.check import Outcome

__all__ = ["app"]

app = typer.Typer(
    help="The papers: what is here, how to use it, and the evidence that it works.", no_args_is_help=True
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
_COLOURS = {"works": "green", "failed": "red", "built": "yellow", "open": "dim"}


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False))


def _console() -> Any:
    # rich costs 40 ms, which --help and --json need not pay.
    from rich.console import Console

    # What another program reads is not folded at 80 columns.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 200)


def _print(*parts: Any) -> None:
    _console().print(*parts)


def _table(*columns: str) -> Any:
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        name, _, justify = column.partition(":")
        table.add_column(name, justify="right" if justify == "right" else "left", no_wrap=name != "title")
    return table


def _one_of(value: str | None, known: Iterable[str], option: str) -> None:
    if value is not None and value not in known:
        raise UsageError(f"--{option} must be one of {', '.join(known)}: got {value!r}")


def _row(record: Record) -> dict[str, Any]:
    keys = ("number", "slug", "title", "year", "kind", "tier", "arxiv")
    return {key: getattr(record, key) for key in keys} | {"state": state(record)}


def _print_rows(rows: list[dict[str, Any]]) -> None:
    from rich.text import Text

    table = _table("no:right", "paper", "state", "kind", "year", "title")
    for row in rows:
        year = str(row["year"] or "")
        paper_state = Text(row["state"], _COLOURS[row["state"]])
        table.add_row(str(row["number"]), row["slug"], paper_state, row["kind"], year, Text(row["title"]))
    _print(table)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:.4g}"


def _print_result(result: dict[str, Any]) -> None:
    from rich.text import Text

    table = _table("claim", "measured:right", "", "threshold:right", "baseline:right", "unit", "verdict")
    table.columns[0].no_wrap = False
    for part in result["requirements"]:
        verdict = Text("holds", "green") if part["passed"] else Text("fails", "red")
        table.add_row(
            Text(part["claim"]), _number(part["measured"]), part["relation"], _number(part["threshold"]),
            _number(part["baseline"]), part["unit"], verdict,
        )  # fmt: skip
    _print(table)
    for note in result["notes"]:
        typer.echo(f"note: {note}")


@app.command("list")
def list_papers(
    paper_state: Annotated[str | None, typer.Option("--state", help="works, failed, built or open.")] = None,
    kind: Annotated[str | None, typer.Option(help="Such as layer, backbone, compress.")] = None,
    tier: Annotated[int | None, typer.Option(help="1 at the heart, 2 close, 3 far.", min=1, max=3)] = None,
    as_json: Json = False,
) -> None:
    """List the papers and their states."""
    _one_of(paper_state, STATES, "state")
    _one_of(kind, KINDS, "kind")
    rows = [
        row
        for row in map(_row, load_records())
        if (paper_state is None or row["state"] == paper_state)
        and (kind is None or row["kind"] == kind)
        and (tier is None or row["tier"] == tier)
    ]
    if as_json:
        _print_json(rows)
    else:
        _print_rows(rows)


@app.command()
def search(
    words: Annotated[list[str], typer.Argument(help="What to look for, such as: large kernel.")],
    limit: Annotated[int, typer.Option(help="How many to show.", min=1)] = 15,
    as_json: Json = False,
) -> None:
    """Rank the papers that match some words."""
    from omniconv.papers.search import search as rank

    hits = rank(" ".join(words), load_records())[:limit]
    if as_json:
        _print_json([_row(record) | {"score": round(score, 3)} for record, score in hits])
    elif hits:
        _print_rows([_row(record) for record, _ in hits])
    else:
        typer.echo(f"no paper matches {' '.join(words)!r}")


@app.command()
def show(
    paper: Annotated[str, typer.Argument(help="Number, slug or arXiv id.")], as_json: Json = False
) -> None:
    """Show what a paper is, what implements it, how to use it, and its evidence."""
    record = get_record(paper)
    result, changed = load_result(record), changed_files(record)
    if as_json:
        values = asdict(record) | {"state": state(record), "usage": usage(record)}
        _print_json(values | {"url": record.url, "result": result, "changed": changed})
        return
    from rich.markup import escape
    from rich.syntax import Syntax

    colour = _COLOURS[state(record)]
    _print(f"[bold]{record.number} {record.slug}[/]  [{colour}]{state(record)}[/]")
    year = f" ({record.year})" if record.year else ""
    _print(escape(f"{record.title}. {', '.join(record.authors)}{year}"))
    typer.echo(record.url + (f"  code: {record.code}" if record.code else ""))
    _print(f"\n{escape(record.summary)}")
    if record.claims:
        _print(f"\n[bold]Published[/]\n{escape(record.claims)}")
    if state(record) == "open":
        typer.echo(f"\nNot built yet; its place is omniconv/{record.home}.")
        return
    _print("\n[bold]Implemented by[/]")
    for name in record.implements:
        typer.echo(name)
    _print("\n[bold]Use[/]")
    _print(Syntax(usage(record), "python", background_color="default"))
    _print("\n[bold]Evidence[/]")
    if result is None:
        typer.echo(f"none yet; run: omniconv papers check {record.slug}" if record.check else "none yet")
    else:
        typer.echo(result["claim"])
        _print_result(result)
        typer.echo(
            f"{result['date']}, {result['seconds']:.0f} s with {result['threads']} threads, "
            f"torch {result['torch']}, commit {result['commit'] or 'unknown'}"
        )
        if changed:
            typer.echo(
                f"changed since: {', '.join(changed)}; renew with: omniconv papers check {record.slug}"
            )
    if record.deviations:
        _print("\n[bold]Deviations[/]")
        for deviation in record.deviations:
            typer.echo(f"- {deviation}")


def _chosen(papers: list[str], everything: bool, changed: bool) -> list[Record]:
    if bool(papers) + everything + changed != 1:
        raise UsageError("say which: papers by number, slug or arXiv id, or --all, or --changed")
    if papers:
        records = list(dict.fromkeys(map(get_record, papers)))
        for record in records:
            if not record.check:
                raise UsageError(f"paper {record.slug} has no check (it is {state(record)})")
        return records
    records = [record for record in load_records() if record.check]
    if changed:
        records = [record for record in records if load_result(record) is None or changed_files(record)]
    return records


def _print_outcome(outcome: "Outcome") -> None:
    record, result = outcome.record, outcome.result
    if result is None:
        _print(f"[bold]{record.number} {record.slug}[/]  [red]could not run[/]")
        typer.echo(outcome.error)
    else:
        verdict = "[green]passed[/]" if outcome.passed else "[red]failed[/]"
        _print(f"[bold]{record.number} {record.slug}[/]  {verdict} in {result['seconds']:.0f} s")
        typer.echo(result["claim"])
        _print_result(result)
    typer.echo("")


@app.command()
def check(
    papers: Annotated[list[str] | None, typer.Argument(help="Numbers, slugs or arXiv ids.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every paper that has a check.")] = False,
    changed: Annotated[
        bool, typer.Option("--changed", help="Those whose code changed since, or that never ran.")
    ] = False,
    jobs: Annotated[int, typer.Option(help="Checks at a time; they share the cores.", min=1)] = 1,
    write: Annotated[bool, typer.Option("--write/--no-write", help="Keep the results as evidence.")] = True,
    as_json: Json = False,
) -> None:
    """Measure whether the claims of papers hold here. Exit code 1 if one does not."""
    chosen = _chosen(papers or [], everything, changed)
    from omniconv.papers.check import run_checks

    outcomes = []
    for outcome in run_checks(chosen, jobs=jobs, write=write):
        outcomes.append(outcome)
        if not as_json:
            _print_outcome(outcome)
    if as_json:
        _print_json(
            [
                {"number": o.record.number, "slug": o.record.slug, "result": o.result, "error": o.error}
                for o in outcomes
            ]
        )
    else:
        passed = sum(outcome.passed for outcome in outcomes)
        typer.echo(f"{passed} of {len(outcomes)} passed")
    if not all(outcome.passed for outcome in outcomes):
        raise typer.Exit(1)


@app.command()
def status(as_json: Json = False) -> None:
    """Count the papers by state and kind, and name results whose code changed since they were measured."""
    records = load_records()
    counts = Counter((record.kind, state(record)) for record in records)
    totals = Counter(map(state, records))
    stale = {record.slug: changed for record in records if (changed := changed_files(record))}
    unrun = [record.slug for record in records if record.check and load_result(record) is None]
    if as_json:
        kinds = {kind: {s: counts[kind, s] for s in STATES} for kind in KINDS}
        states = {s: totals[s] for s in STATES}
        _print_json(
            {"papers": len(records), "states": states, "kinds": kinds, "stale": stale, "unrun": unrun}
        )
        return
    table = _table("kind", *(f"{s}:right" for s in STATES), "papers:right")
    for kind in KINDS:
        row = [counts[kind, s] for s in STATES]
        table.add_row(kind, *(str(n or "") for n in row), str(sum(row)))
    table.add_row("all", *(str(totals[s]) for s in STATES), str(len(records)), style="bold")
    _print(table)
    for slug, files in stale.items():
        typer.echo(f"stale: {slug} ({', '.join(files)} changed since)")
    if unrun:
        typer.echo(f"check never run: {', '.join(unrun)}")
    if stale or unrun:
        typer.echo("renew with: omniconv papers check --changed")
