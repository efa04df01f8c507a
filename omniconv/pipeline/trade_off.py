"""The page of a compression: every candidate, and the front that none of them beats."""

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from omniconv.core.units import bytes_text, seconds_text
from omniconv.pipeline import charts
from omniconv.pipeline.wording import share

__all__ = ["render_trade_off"]


def render_trade_off(run: str, result: Mapping[str, Any]) -> str:
    """Return `compress.html`, one page without any reference to the outside.

    Args:
        run: name of the run.
        result: what `omniconv.pipeline.shrink.compress` returns.
    """
    rows = [{**row, "name": _name(row)} for row in result["tried"]]
    first = rows[0]
    timed = [row for row in rows if row["latency"]]
    drawings = [
        _draw(rows, "bytes", "size of the file", bytes_text, result["metric"]),
        _draw(timed, "latency", "time for one picture", seconds_text, result["metric"]),
    ]
    table = [
        {
            "name": row["name"],
            "size": bytes_text(row["bytes"]),
            "smaller": f"{first['bytes'] / row['bytes']:.1f}x",
            "time": seconds_text(row["latency"]) if row["latency"] else "",
            "faster": f"{first['latency'] / row['latency']:.1f}x" if row["latency"] else "",
            "value": _value(row["value"]),
            "drop": f"{100 * (row['value'] - first['value']):+.2f}",
            "kept": bool(row["path"]),
        }
        for row in rows
    ]
    environment = Environment(
        loader=PackageLoader("omniconv.pipeline"), autoescape=True, undefined=StrictUndefined
    )
    style = (files("omniconv.pipeline") / "templates" / "report.css").read_text(encoding="utf-8")
    return environment.get_template("compress.html.j2").render(
        run=run,
        metric=result["metric"].replace("_", " "),
        kept=next(row for row in table if row["kept"]),
        rows=table,
        drawings=drawings,
        notes=result["notes"],
        max_drop=share(result["max_drop"]),
        style=Markup(style),
    )


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['form']} -{row['removed']:.0%}" if row["removed"] else row["form"]


def _value(value: float) -> str:
    return f"{value:.4f}"


def _draw(rows: list[dict[str, Any]], cost: str, x_name: str, x_format: Any, metric: str) -> Markup:
    return charts.trade_off(
        [(row[cost], row["value"], row["name"], bool(row["path"])) for row in rows],
        label=f"{metric} against {x_name} of {len(rows)} candidates",
        x_name=x_name,
        x_format=x_format,
        y_format=_value,
    )
