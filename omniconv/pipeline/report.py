"""The report: everything that `summary.json` says, as one page that needs nothing else."""

import base64
import hashlib
import shlex
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from omniconv.core.units import bytes_text, seconds_text
from omniconv.pipeline import charts, sections
from omniconv.pipeline.wording import big, count, number, plain, setting, share, visible

__all__ = ["render_report"]


def render_report(summary: Mapping[str, Any], pictures: Mapping[str, Any]) -> str:
    """Return the report of a run as one HTML page without any reference to the outside.

    A section whose numbers are missing is left out. Every text of the data is escaped, and characters that
    could not be seen are written out.

    Args:
        summary: the contents of `summary.json`.
        pictures: "best", "worst", "confused" and "samples": lists of dicts with "id", "image" (PNG bytes),
            "cam" (PNG bytes or None), "target", "prediction" and "confidence"; "filters": PNG bytes or None.
    """
    return _template().render(_build(sections.Facts(summary, pictures)))


@cache
def _template() -> Template:
    folder = files("omniconv.pipeline") / "templates"
    script = (folder / "report.js").read_text(encoding="utf-8")
    environment = Environment(
        loader=PackageLoader("omniconv.pipeline"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(share=share, count=count)
    environment.globals.update(
        style=Markup((folder / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        # The page runs this script and no other, whatever the data may hold.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    return environment.get_template("report.html.j2")


def _build(known: sections.Facts) -> dict[str, Any]:
    """Return everything that the template needs."""
    built = {
        "data": sections.data(known),
        "training": sections.training(known),
        "metrics": sections.metrics(known),
        "confusion": sections.confusion(known),
        "calibration": sections.calibration(known),
        "scatter": sections.scatter(known),
        "per_class": sections.per_class(known),
        "examples": _examples(known),
        "filters": _filters(known),
        "cost": _cost(known),
        "export": _export(known),
        "plan": _plan(known),
        "use": _use(known),
    }
    titles = {
        "data": "The data", "training": "Training", "metrics": "Results",
        "confusion": "Confusions", "calibration": "Can you trust its confidence?",
        "scatter": "Predicted and true", "per_class": "Class by class",
        "examples": "Where it looks", "filters": "First-layer filters", "cost": "What it costs",
        "export": "Export", "plan": "The plan and its reasons", "use": "Use it",
    }  # fmt: skip
    if known.task == "multilabel":
        titles["per_class"] = "Label by label"
    present = {name: section for name, section in built.items() if section}
    short = {"calibration": "Confidence", "plan": "Plan", "filters": "Filters", "cost": "Cost"}
    return {
        **dict.fromkeys(built),
        **present,
        "titles": titles,
        "nav": [(name, short.get(name, titles[name])) for name in present],
        "head": _head(known),
        "hero": _hero(known),
        "tiles": _tiles(known),
        "notes": [visible(note) for note in known.summary.get("notes") or []],
    }


def _head(known: sections.Facts) -> dict[str, Any]:
    source = known.data.get("source")
    name = visible(source or known.summary.get("name") or "a run")
    return {
        "title": name.rstrip("/").rpartition("/")[2] or name,
        "run": visible(known.summary.get("path") or known.summary.get("name") or ""),
        "created": visible(known.summary.get("created") or ""),
        "command": visible(known.summary.get("command") or ""),
        "version": visible(known.summary.get("omniconv") or ""),
        "fingerprint": visible(known.data.get("fingerprint") or ""),
    }


def _rows(known: sections.Facts) -> list[tuple[str, str, dict[str, Any]]]:
    """Return (who, style, value) of the main metric for the network and its baselines."""
    baselines = known.summary.get("baselines") or {}
    simple = {
        "classification": "always guessing the commonest class",
        "multilabel": "always guessing each label's share",
    }.get(known.task, "always guessing the mean")
    named = [
        ("this network", "a", known.summary.get("metrics") or {}),
        ("a linear model", "b", baselines.get("linear") or {}),
        (simple, "c", baselines.get("majority") or {}),
    ]
    rows = [(who, style, known.metric.row(values.get(known.main))) for who, style, values in named]
    return [(who, style, row) for who, style, row in rows if row]


def _hero(known: sections.Facts) -> dict[str, Any] | None:
    rows = _rows(known)
    if not rows or rows[0][0] != "this network":
        return None
    row, tested = rows[0][2], known.tested()
    of = f"of {count(tested)} test picture{'s' if tested != 1 else ''}" if tested else "of the test pictures"
    rest = {
        "accuracy": f"{of} right",
        "mean_average_precision": f"mean average precision on {of[3:]}",
        "mae": f"off on average, {of}"
        if not tested
        else f"off on average over {count(tested)} test pictures",
    }.get(known.main, f"{known.metric.label} on {of[3:]}")
    chart = charts.intervals(
        [(who[0].upper() + who[1:], r["value"], r["low"], r["high"], style) for who, style, r in rows],
        label="; ".join(f"{who}: {r['text']}" for who, _, r in rows),
        y_format=known.metric.text,
        axis_format=known.metric.axis,
        unit=known.metric.unit,
    )
    return {
        "number": row["text"],
        "rest": rest,
        "interval": row["interval"],
        "others": [(who, r["text"]) for who, _, r in rows[1:]],
        "verdict": _verdict(known, rows),
        "chart": chart,
    }


def _verdict(known: sections.Facts, rows: list[tuple[str, str, dict[str, Any]]]) -> tuple[str, str] | None:
    """Return (style, sentence): what the comparison with the better baseline shows, and no more."""
    if len(rows) < 2:
        return None
    sign = 1 if known.metric.higher else -1
    own = rows[0][2]
    who, _, best = max(rows[1:], key=lambda row: sign * row[2]["value"])
    if sign * own["value"] <= sign * best["value"]:
        return "bad", f"It does no better than {who}: look at the data and the plan before you use it."
    apart = own["low"] > best["high"] if known.metric.higher else own["high"] < best["low"]
    if apart:
        return "good", f"Better than {who}; the 95% intervals are clear of each other."
    return "warn", f"Better than {who}, but the 95% intervals overlap: more test pictures would tell."


def _tiles(known: sections.Facts) -> list[tuple[str, str, str]]:
    """Return (name, value, remark) of what people ask first."""
    cost, plan = known.summary.get("cost") or {}, known.summary.get("plan") or {}
    tiles = []
    if plan.get("network"):
        size = number(plan.get("size"))
        pixels = f"at {size:.0f} × {size:.0f} pixels" if size else ""
        tiles.append(("Network", visible(plan["network"]), pixels))
    if (parameters := number(cost.get("parameters"))) is not None:
        macs = number(cost.get("macs"))
        tiles.append(("Parameters", big(parameters), f"{big(macs)} multiply-adds" if macs else ""))
    if latencies := [row for row in known.latencies() if row["batch"] == 1]:
        fastest = min(latencies, key=lambda row: row["seconds"])
        tiles.append(("One picture takes", seconds_text(fastest["seconds"]), fastest["name"]))
    if (train := number((known.summary.get("seconds") or {}).get("train"))) is not None:
        epochs = len(known.summary.get("history") or [])
        tiles.append(("Trained in", seconds_text(train), f"{epochs} epochs" if epochs else ""))
    if exported := (known.summary.get("export") or {}).get("files"):
        verified = sum(bool(file.get("verified")) for file in exported)
        state = "verified on real pictures" if verified == len(exported) else f"{verified} verified"
        tiles.append(("Exported", f"{len(exported)} file{'s' if len(exported) != 1 else ''}", state))
    return tiles


def _examples(known: sections.Facts) -> list[dict[str, Any]] | None:
    words = {
        "best": ("Sure and right", "Right answers with the highest confidence."),
        "worst": (
            "Sure and wrong",
            "Mistakes made with the highest confidence: wrong labels often show up here.",
        ),
        "confused": ("Most confused", "One picture each of the pairs that are mixed up most often."),
    }
    if known.task != "classification":
        words["best"] = ("Closest", "Test pictures with the smallest errors.")
        words["worst"] = (
            "Furthest off",
            "Test pictures with the largest errors: wrong labels often show up here.",
        )
    groups = [
        {"title": title, "text": text, "items": items}
        for kind, (title, text) in words.items()
        if (items := known.items(kind))
    ]
    return groups or None


def _filters(known: sections.Facts) -> dict[str, Any] | None:
    content = known.pictures.get("filters")
    return {"image": sections.data_url(content)} if content else None


def _cost(known: sections.Facts) -> dict[str, Any] | None:
    cost = known.summary.get("cost") or {}
    facts = []
    if (value := number(cost.get("parameters"))) is not None:
        facts.append(("parameters", count(value)))
    if (value := number(cost.get("macs"))) is not None:
        facts.append(("multiply-adds for one picture", big(value)))
    if (value := number(cost.get("file_bytes"))) is not None:
        facts.append(("weight file", bytes_text(value)))
    latencies = known.latencies()
    if not facts and not latencies:
        return None
    return {"facts": facts, "latencies": latencies, "int8": _int8(known)}


def _int8(known: sections.Facts) -> str | None:
    """Return what static int8 costs and brings, in one sentence."""
    found = known.summary.get("int8") or {}
    keys = ("bytes_before", "bytes_after", "speedup", "score_before", "score_after")
    before, after, speedup, was, now = (number(found.get(key)) for key in keys)
    if before is None or after is None or speedup is None or was is None or now is None:
        return None
    return (
        f"int8: {bytes_text(after)} instead of {bytes_text(before)}, {speedup:.2g} times as fast; "
        f"{visible(found.get('measure') or 'score')} {plain(now)} instead of {plain(was)}."
    )


def _export(known: sections.Facts) -> list[dict[str, Any]] | None:
    rows = []
    for file in (known.summary.get("export") or {}).get("files") or []:
        difference, size = number(file.get("max_difference")), number(file.get("bytes"))
        rows.append(
            {
                "path": visible(file.get("path", "")),
                "format": visible(file.get("format", "")),
                "size": bytes_text(size) if size is not None else "–",
                "difference": "–" if difference is None else f"{difference:.1e}" if difference else "0",
                "verified": bool(file.get("verified")),
            }
        )
    return rows or None


def _plan(known: sections.Facts) -> dict[str, Any] | None:
    plan = dict(known.summary.get("plan") or {})
    if not plan:
        return None
    reasons = [visible(reason) for reason in plan.pop("reasons", None) or []]
    augment = plan.pop("augment", None) or {}
    settings = [
        (visible(key).replace("_", " "), setting(value))
        for key, value in plan.items()
        if value not in (None, {}, [])
    ]
    done = [
        (visible(key).replace("_", " "), setting(value))
        for key, value in augment.items()
        if _augments(key, value, augment)
    ]
    return {"settings": settings, "augment": done, "reasons": reasons, "has_augment": bool(augment)}


def _use(known: sections.Facts) -> dict[str, Any] | None:
    place = known.summary.get("path") or known.summary.get("name")
    if not place:
        return None
    run = shlex.quote(visible(place))
    commands = [
        ("Sort new pictures into a table", f"omniconv predict {run} NEW --out pred.csv"),
        ("Serve it to programs and browsers", f"omniconv serve {run}"),
        ("Measure it on other labelled pictures", f"omniconv eval {run} TEST"),
        ("See where it looks in one picture", f"omniconv explain {run} cat.jpg"),
        ("Write deployable files", f"omniconv export {run} --to onnx,openvino"),
        ("Make it smaller", f"omniconv compress {run} --size 2MB --max-drop 1%"),
        ("Time it on another machine", f"omniconv bench {run}"),
    ]
    python = (
        "import omniconv\n\n"
        f"run = omniconv.load({visible(place)!r})\n"
        'for answer in run.predict("NEW"):\n'
        "    print(answer)\n"
        'run.export("onnx")'
    )
    return {"commands": commands, "python": python}


def _augments(key: str, value: Any, augment: Mapping[str, Any]) -> bool:
    """Tell whether a setting of the augmentation does something."""
    if key == "crop_padding":
        return augment.get("crop") == "pad"
    if key == "crop_scale":
        return augment.get("crop") == "resized"
    return value not in (False, 0, None, "none", "")
