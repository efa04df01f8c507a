"""How results look on a terminal."""

import sys
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

from omniconv.core.units import bytes_text, seconds_text

if TYPE_CHECKING:
    from omniconv.data.schema import Problem
    from omniconv.data.sources import ImageData
    from omniconv.pipeline.run import Run

__all__ = [
    "Bar", "FitDisplay", "bench_table", "compress_table", "data_table", "doctor_table", "export_table",
    "metric_table", "model_table", "prediction_table",
]  # fmt: skip

_STAGES = {
    "audit": "looking at every picture",
    "plan": "measuring this machine, planning",
    "train": "training",
    "evaluate": "testing",
    "explain": "drawing activation maps",
    "export": "exporting and verifying",
    "bench": "timing",
}
_COLOURS = {"error": "red", "warning": "yellow", "info": "dim"}


def _console(stderr: bool = False) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    # What another program reads is not folded at 80 columns.
    return Console(stderr=stderr, highlight=False, width=None if stream.isatty() else 160)


def _table(*columns: str) -> Table:
    """Return a plain table; a column name that ends with ":" is right-aligned."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column.rstrip(":"), justify="right" if column.endswith(":") else "left")
    return table


class Bar:
    """A progress bar on stderr, and nothing where stderr is no terminal."""

    def __init__(self, what: str, quiet: bool = False) -> None:
        console = _console(stderr=True)
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
            console=console, transient=True, disable=quiet or not console.is_terminal,
        )  # fmt: skip
        self.task = self.progress.add_task(what, total=None)

    def __enter__(self) -> "Bar":
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def update(self, done: int, count: int) -> None:
        """Show that `done` of `count` are done."""
        self.progress.update(self.task, completed=done, total=count)


class FitDisplay:
    """What a person sees while a network trains: loss, metric, speed and time left.

    On a terminal one line is kept up to date; in a log file every epoch is one line.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.console = _console(stderr=True)
        self.quiet = quiet
        self.live: Live | None = None
        self.status = Text()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TaskProgressColumn(),
            console=self.console,
        )
        self.task = self.bar.add_task("", total=1)

    def __enter__(self) -> "FitDisplay":
        if not self.quiet and self.console.is_terminal:
            self.live = Live(
                Group(self.bar, self.status), console=self.console, refresh_per_second=8, transient=True
            )
            self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.live is not None:
            self.live.stop()

    def _print(self, text: str, style: str = "") -> None:
        if not self.quiet:
            self.console.print(Text(text, style))

    def on_event(self, event: dict[str, Any]) -> None:
        """Show one event of `omniconv.pipeline.fit.Fit`."""
        kind = event["event"]
        if kind == "stage":
            self.bar.update(self.task, description=_STAGES[event["stage"]], completed=0, total=None)
            self.status.plain = ""
            if self.live is None:
                self._print(_STAGES[event["stage"]])
        elif kind == "progress":
            self.bar.update(self.task, completed=event["done"], total=event["count"])
        elif kind in ("note", "warning"):
            self._print(event["message"], "yellow")
        elif kind == "plan":
            plan = event["plan"]
            self._print(
                f"{plan['network']} at {plan['size']} x {plan['size']}, {plan['epochs']} epochs of batch "
                f"{plan['batch']}, {plan['precision']}",
                "bold",
            )
            for reason in plan["reasons"]:
                self._print(f"  {reason}", "dim")
        elif kind == "step":
            self.bar.update(self.task, completed=event["step"], total=event["steps"])
            self.status.plain = self._status(event)
        elif kind == "epoch":
            self._epoch(event)

    @staticmethod
    def _status(event: dict[str, Any]) -> str:
        parts = [f"epoch {event['epoch'] + 1}/{event['epochs']}", f"loss {event['loss']:.3f}"]
        if event["metric"] is not None:
            parts.append(f"{_name(event['metric_name'])} {_value(event['metric_name'], event['metric'])}")
        parts.append(f"{event['images_per_second']:.0f} pictures/s")
        parts.append(f"{seconds_text(event['seconds_left'])} left")
        return "  ".join(parts)

    def _epoch(self, event: dict[str, Any]) -> None:
        line = f"epoch {event['epoch']:3d}/{event['epochs']}  loss {event['train_loss']:.3f}"
        if event["val_metric"] is not None:
            line += f"  {_name(event['metric_name'])} {_value(event['metric_name'], event['val_metric'])}"
        self._print(f"{line}  {event['images_per_second']:.0f} pictures/s  {seconds_text(event['seconds'])}")

    def finished(self, run: "Run") -> None:
        """Show the result and where it is."""
        summary, console = run.summary, _console()
        name = summary["main_metric"]
        metric = summary["metrics"][name]
        value, low, high = (_value(name, metric[key]) for key in ("value", "low", "high"))
        tested = summary["data"]["sizes"]["test"]
        line = f"{_name(name)} on {tested:,} test pictures: {value} (95% interval {low} to {high})"
        console.print(Text(line, "bold green"))
        for baseline, label in (("majority", "without looking"), ("linear", "a linear model")):
            values = summary["baselines"][baseline]
            console.print(f"  {label}: {_value(name, values[name]['value'])}")
        cost = summary["cost"]
        console.print(
            f"  {cost['parameters']:,} parameters, {cost['macs'] / 1e6:.1f} million multiply-adds a picture"
        )
        for file in summary.get("export", {}).get("files", []):
            console.print(
                f"  {file['format']}: {run.path / 'export' / file['path']} ({bytes_text(file['bytes'])}, "
                f"differs from PyTorch by {file['max_difference']:.1e})"
            )
        console.print(f"report: {run.report}")
        console.print(f"next:   omniconv predict {run.path} NEW --out pred.csv")


_PLAIN = ("nll", "mae", "rmse", "r2", "ece")


def _name(metric: str) -> str:
    return metric.replace("_", " ")


def _value(metric: str, value: float) -> str:
    return f"{value:.4g}" if metric in _PLAIN else f"{value:.1%}"


def data_table(data: "ImageData", problems: Sequence["Problem"]) -> None:
    """Print what `omniconv check` found."""
    console, schema = _console(), data.schema
    console.print(
        f"[bold]{data.name}[/bold]: {len(data):,} pictures, about {schema.width} x {schema.height}, "
        f"{schema.channels} channel{'s' if schema.channels > 1 else ''}; "
        + (f"{schema.task}, {len(schema.classes)} classes" if schema.task != "none" else "no labels"),
        soft_wrap=True,
    )
    if schema.task == "classification":
        counts = Counter((sample.split or "all", sample.target) for sample in data.samples)
        splits = [s for s in ("train", "val", "test", "all") if any(key[0] == s for key in counts)]
        table = _table("class", *(f"{split}:" for split in splits))
        for number, name in enumerate(schema.classes[:50]):
            table.add_row(Text(name), *(f"{counts[split, number]:,}" for split in splits))
        console.print(table)
        if len(schema.classes) > 50:
            console.print(f"and {len(schema.classes) - 50} more classes")
    if not problems:
        console.print(Text("no problems found", "green"))
    for problem in problems:
        console.print(
            Text.assemble((f"{problem.severity:8s}", _COLOURS[problem.severity]), " ", problem.message)
        )


def prediction_table(rows: Sequence[dict[str, Any]], out: str | None) -> None:
    """Print predictions, or where they were written."""
    console = _console()
    failed = [row for row in rows if "error" in row]
    if out is None:
        table = _table("picture", "prediction", "confidence:")
        for row in rows[:40]:
            sure = f"{row['confidence']:.1%}" if "confidence" in row else ""
            table.add_row(Text(row["id"]), Text(row.get("label", row.get("error", ""))), sure)
        console.print(table)
        if len(rows) > 40:
            console.print(f"and {len(rows) - 40:,} more; write all of them with --out pred.csv")
    else:
        console.print(f"{len(rows) - len(failed):,} predictions in {out}", soft_wrap=True)
    for row in failed[:5] if out is not None else []:
        console.print(Text(row["error"], "yellow"))
    if out is not None and len(failed) > 5:
        console.print(
            Text(f"and {len(failed) - 5} more pictures that cannot be read, named in {out}", "yellow")
        )


def metric_table(result: dict[str, Any]) -> None:
    """Print metrics with their intervals."""
    console = _console()
    console.print(f"{result['source']}: {result['pictures']:,} pictures", soft_wrap=True)
    table = _table("metric", "value:", "95% interval")
    for name, row in result["metrics"].items():
        table.add_row(
            _name(name),
            _value(name, row["value"]),
            f"{_value(name, row['low'])} to {_value(name, row['high'])}",
        )
    console.print(table)
    for row in result["unreadable"]:
        console.print(Text(row["error"], "yellow"))


def export_table(run: str, result: dict[str, Any]) -> None:
    """Print what was exported."""
    table = _table("format", "file", "size:", "differs from PyTorch by:")
    for file in result["files"]:
        table.add_row(
            file["format"],
            f"{run}/export/{file['path']}",
            bytes_text(file["bytes"]),
            f"{file['max_difference']:.1e}",
        )
    _console().print(table)
    if "triton" in result:
        _console().print(f"Triton model repository: {result['triton']}", soft_wrap=True)


def bench_table(result: dict[str, Any]) -> None:
    """Print latencies side by side."""
    console = _console()
    rows = result["latency_ms"]
    table = _table("form", "pictures:", "median:", "90th percentile:", "pictures/s:")
    for name, row in rows.items():
        rate = 1e3 * row["batch"] / row["median"]
        table.add_row(
            name.split(",")[0],
            str(row["batch"]),
            f"{row['median']:.3g} ms",
            f"{row['p90']:.3g} ms",
            f"{rate:,.0f}",
        )
    console.print(table)
    console.print(f"{result['threads']} threads; from raw pixels to the answer")


def mixer_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print what token mixers reached in one network."""
    table = _table(
        "mixer", "parameters:", "multiply-adds:", "trained/s:", "answered/s:", "field:", "shift:", "rotation:",
        "scale:", "accuracy:",
    )  # fmt: skip
    for row in rows:
        table.add_row(
            row["mixer"],
            f"{row['parameters']:,}",
            f"{row['macs'] / 1e6:.2f} M",
            f"{row['training_rate']:,.0f}",
            f"{row['inference_rate']:,.0f}",
            *(f"{row[key]:.1%}" for key in ("field", "shift", "rotation", "scale", "accuracy")),
        )
    console = _console()
    console.print(table)
    console.print(
        "handwritten digits of 32 pixels; field: area that holds half of what moves the middle of the last map;\n"
        "shift, rotation, scale: answers that such a change of the picture leaves as they were"
    )


def compress_table(result: dict[str, Any]) -> None:
    """Print what was tried and what was kept."""
    console = _console()
    metric = result["metric"]
    table = _table("form", "removed:", "size:", "latency:", f"{_name(metric)}:", "kept")
    for row in result["tried"]:
        table.add_row(
            row["form"],
            f"{row['removed']:.0%}",
            bytes_text(row["bytes"]),
            seconds_text(row["latency"]) if row.get("latency") else "",
            _value(metric, row["value"]),
            "kept" if row["path"] == result["path"] else "",
        )
    console.print(table)
    console.print(f"wrote {result['path']}", soft_wrap=True)


def model_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print networks."""
    table = _table("network", "parameters:", "multiply-adds:", "pixels:")
    for row in rows:
        parameters = f"{row['parameters'] / 1e6:.2f} M" if row["parameters"] else ""
        macs = f"{row['multiply_adds'] / 1e9:.2f} G" if row["multiply_adds"] else ""
        table.add_row(row["name"], parameters, macs, str(row["size"]))
    _console().print(table)


def doctor_table(found: dict[str, Any]) -> None:
    """Print what this machine has."""
    console = _console()
    for section, values in found.items():
        console.print(f"[bold]{section}[/bold]")
        table = _table("", "")
        table.show_header = False
        for key, value in values.items():
            table.add_row(f"  {key}", Text(str(value)))
        console.print(table)
