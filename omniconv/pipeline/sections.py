"""The sections of the report about data, training and results: finished texts, widths and drawings."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from omniconv.core.units import seconds_text
from omniconv.pipeline import charts
from omniconv.pipeline.wording import Metric, axis, count, number, plain, share, visible

__all__ = [
    "Facts",
    "calibration",
    "confusion",
    "data",
    "data_url",
    "metrics",
    "per_class",
    "scatter",
    "training",
]

_STAGES = {
    "audit": "checking the data", "plan": "planning", "train": "training", "evaluate": "evaluating",
    "explain": "drawing maps", "export": "exporting", "bench": "timing",
}  # fmt: skip
_RUNTIMES = {
    "eager": "PyTorch", "torch.export": "torch.export", "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO", "int8": "ONNX Runtime, int8",
}  # fmt: skip
_SPLITS = ("train", "val", "test")
_LARGE_IMAGE = 24_000


def data_url(content: bytes) -> str:
    """Return a picture for the page; a photograph as WebP, a fifth of its size as PNG."""
    kind = "png"
    if len(content) > _LARGE_IMAGE:
        from PIL import Image

        buffer = io.BytesIO()
        Image.open(io.BytesIO(content)).save(buffer, format="WEBP", quality=82)
        if buffer.tell() < len(content):
            content, kind = buffer.getvalue(), "webp"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


class Facts:
    """A summary and its pictures, with what several sections need from them."""

    def __init__(self, summary: Mapping[str, Any], pictures: Mapping[str, Any]) -> None:
        self.summary, self.pictures = summary, pictures
        self.task = summary.get("task") or "classification"
        self.data: Mapping[str, Any] = summary.get("data") or {}
        self.classes = [visible(name) for name in self.data.get("classes") or []]
        self.main = summary.get("main_metric") or next(iter(summary.get("metrics") or {}), "")
        self.metric = Metric(self.main)

    def tested(self) -> int | None:
        """Return the number of test pictures, where the summary tells it."""
        if self.summary.get("confusion"):
            return sum(map(sum, self.summary["confusion"]))
        counts = (self.data.get("counts") or {}).get("test") or {}
        # A picture with several labels is counted once under each, so their sum says nothing.
        return None if self.task == "multilabel" or not counts else int(sum(counts.values()))

    def latencies(self) -> list[dict[str, Any]]:
        """Return how long a picture takes in every runtime that was timed."""
        rows = []
        for name, entry in ((self.summary.get("cost") or {}).get("latency_ms") or {}).items():
            if not isinstance(entry, Mapping) or not (median := number(entry.get("median"))):
                continue
            batch = int(number(entry.get("batch")) or 1)
            seconds = median / 1e3 / batch
            rows.append(
                {
                    # "int8, 32 pictures": the number of pictures has a column of its own.
                    "name": _RUNTIMES.get(name.partition(",")[0], visible(name)),
                    "seconds": seconds,
                    "text": seconds_text(median / 1e3),
                    "batch": batch,
                    "rate": count(1 / seconds) if seconds < 0.1 else f"{1 / seconds:.3g}",
                }
            )
        slowest = max((row["seconds"] for row in rows), default=1)
        for row in rows:
            row["width"] = f"{100 * row['seconds'] / slowest:.1f}"
        return rows

    def says(self, value: Any) -> str:
        """Return a target or a prediction for people: a name, names, or a number."""
        if isinstance(value, str):
            return visible(value) or "nothing"
        if isinstance(value, Sequence):
            if self.task == "multilabel" and value and not isinstance(value[0], str):
                value = [name for name, on in zip(self.classes, value, strict=False) if on > 0.5]
            return ", ".join(map(self.says, value)) or "nothing"
        if self.task == "classification" and isinstance(value, int) and 0 <= value < len(self.classes):
            return self.classes[value]
        shown = number(value)
        return "–" if shown is None else plain(shown)

    def items(self, kind: str) -> list[dict[str, Any]]:
        """Return the pictures of a kind with their words."""
        items = []
        for item in self.pictures.get(kind) or []:
            target, said = self.says(item.get("target")), self.says(item.get("prediction"))
            confidence = number(item.get("confidence"))
            items.append(
                {
                    "id": visible(item.get("id", "")),
                    "image": data_url(item["image"]),
                    "cam": data_url(item["cam"]) if item.get("cam") else None,
                    "target": target,
                    "said": said,
                    "has_prediction": item.get("prediction") is not None,
                    "right": target == said if self.task == "classification" else None,
                    "confidence": share(confidence) if confidence is not None else None,
                }
            )
        return items


def data(known: Facts) -> dict[str, Any] | None:
    """Return what there is, what is wrong with it, and how it was split."""
    if not known.data:
        return None
    counts = {name: (known.data.get("counts") or {}).get(name) or {} for name in _SPLITS}
    names = list(dict.fromkeys(name for split in counts.values() for name in split))
    splits = [(name, int(sum(split.values()))) for name, split in counts.items() if split]
    rows = []
    for name in names if len(names) > 1 else []:
        each = [int(counts[split].get(name, 0)) for split in _SPLITS]
        rows.append({"name": visible(name), "each": each, "total": sum(each)})
    most = max((row["total"] for row in rows), default=0) or 1
    for row in rows:
        row["widths"] = [f"{100 * value / most:.2f}" for value in row["each"]]
    if len(rows) > 40:
        rows.sort(key=lambda row: -row["total"])
    facts = []
    if known.data.get("samples") is not None:
        facts.append(("pictures", count(known.data["samples"])))
    if len(known.classes) and known.task != "regression":
        facts.append(("labels" if known.task == "multilabel" else "classes", count(len(known.classes))))
    elif known.classes:
        facts.append(("target" + ("s" if len(known.classes) > 1 else ""), ", ".join(known.classes)))
    if known.data.get("height") and known.data.get("width"):
        height, width = known.data["height"], known.data["width"]
        facts.append(("typical size, height × width", f"{height:g} × {width:g}"))
    if channels := known.data.get("channels"):
        kind = {1: "1 (grey)", 3: "3 (colour)"}.get(channels, str(channels))
        facts.append(("channels", kind))
    if known.task != "multilabel":
        facts += [({"val": "validation"}.get(name, name), count(value)) for name, value in splits]
    order = {"error": 0, "warning": 1, "info": 2}
    problems = [
        {
            "severity": problem.get("severity") if problem.get("severity") in order else "info",
            "kind": visible(problem.get("kind") or ""),
            "message": visible(problem.get("message") or ""),
            "count": problem.get("count"),
        }
        for problem in known.data.get("problems") or []
    ]
    problems.sort(key=lambda problem: order[problem["severity"]])
    return {
        "facts": facts,
        "rows": rows,
        "present": [name for name, split in counts.items() if split],
        "problems": problems if "problems" in known.data else None,
        "samples": known.items("samples"),
        "source": visible(known.data.get("source") or ""),
    }


def training(known: Facts) -> dict[str, Any] | None:
    """Return the curves of loss, metric and learning rate, and where the time went."""
    history = [row for row in known.summary.get("history") or [] if isinstance(row, Mapping)]
    if not history:
        return None

    def points(key: str) -> list[tuple[float, float]]:
        pairs = [(number(row.get("epoch")), number(row.get(key))) for row in history]
        return [(x, y) for x, y in pairs if x is not None and y is not None]

    drawn, facts = [], []
    losses = [
        charts.Series("training", points("train_loss"), "a"),
        charts.Series("validation", points("val_loss"), "b"),
    ]
    if any(series.points for series in losses):
        last = ", ".join(f"{s.name} ends at {s.points[-1][1]:.3g}" for s in losses if s.points)
        drawn.append(
            ("Loss", charts.lines(losses, label=f"Loss by epoch: {last}", x_name="epoch", y_format=axis))
        )
    if values := points("val_metric"):
        sign = 1 if known.metric.higher else -1
        x, best = max(values, key=lambda point: sign * point[1])
        name = known.metric.label
        drawn.append(
            (
                f"Validation {name}",
                charts.lines(
                    [charts.Series(name, values, "b")], x_name="epoch", y_format=known.metric.axis,
                    label=f"Validation {name} by epoch; best {known.metric.text(best)} at epoch {x:g}",
                    mark=(x, best, f"{known.metric.text(best)}, epoch {x:g}"),
                ),
            )
        )  # fmt: skip
        facts.append(f"Best validation {name}: {known.metric.text(best)} at epoch {x:g} of {len(history)}.")
    if rates := points("lr"):
        chart = charts.lines(
            [charts.Series("learning rate", rates, "c")], x_name="epoch", y_format=axis,
            label=f"Learning rate by epoch, at most {max(y for _, y in rates):.3g}",
        )  # fmt: skip
        drawn.append(("Learning rate", chart))
    if speeds := sorted(y for _, y in points("images_per_second")):
        facts.append(f"Median speed: {count(speeds[len(speeds) // 2])} pictures a second.")
    return {"charts": drawn, "facts": facts, "stages": _stages(known)} if drawn else None


def _stages(known: Facts) -> list[dict[str, str]]:
    seconds = {name: number(value) for name, value in (known.summary.get("seconds") or {}).items()}
    spent = {name: value for name, value in seconds.items() if value}
    total = sum(spent.values())
    return [
        {
            "name": _STAGES.get(name, visible(name)),
            "text": seconds_text(value),
            "width": f"{100 * value / total:.2f}",
        }
        for name, value in spent.items()
    ]


def metrics(known: Facts) -> dict[str, Any] | None:
    """Return every metric with its interval beside those of the baselines."""
    baselines = known.summary.get("baselines") or {}
    columns = [("This network", known.summary.get("metrics") or {})]
    columns += [
        (title, baselines[key])
        for key, title in (("linear", "Linear model"), ("majority", "Without looking"))
        if baselines.get(key)
    ]
    rows = []
    for name in columns[0][1]:
        metric = Metric(name)
        cells = [metric.row(values.get(name)) for _, values in columns]
        if cells[0]:
            rows.append({"metric": metric, "cells": cells, "main": name == known.main})
    return {"columns": [title for title, _ in columns], "rows": rows} if rows else None


def confusion(known: Facts) -> dict[str, Any] | None:
    """Return the matrix, as a table up to 20 classes and as a picture beyond, and the most confused pairs."""
    matrix = known.summary.get("confusion")
    if not matrix or any(len(row) != len(matrix) for row in matrix):
        return None
    names = known.classes if len(known.classes) == len(matrix) else [str(i) for i in range(len(matrix))]
    shares = [[value / (sum(row) or 1) for value in row] for row in matrix]
    pairs = [
        {
            "true": names[i],
            "said": names[j],
            "count": value,
            "of": sum(row),
            "share": shares[i][j],
            "width": f"{100 * shares[i][j]:.1f}",
        }
        for i, row in enumerate(matrix)
        for j, value in enumerate(row)
        if i != j and value
    ]
    pairs.sort(key=lambda pair: (-pair["count"], -pair["share"]))
    small = len(matrix) <= 20
    cells = [
        [
            {
                "count": value,
                "style": "hit" if i == j else "miss",
                "fill": 0 if not value else 100 if shares[i][j] > 0.85 else round(10 + 60 * shares[i][j]),
            }
            for j, value in enumerate(row)
        ]
        for i, row in enumerate(matrix)
    ]
    label = f"Confusion matrix of {len(matrix)} classes; the table of the most confused pairs says the same in words"
    return {
        "names": names,
        "cells": cells if small else None,
        "picture": None if small else charts.matrix(shares, names, label=label),
        "named": len(matrix) <= 60,
        "pairs": pairs[: 10 if small else 20],
        "wrong": sum(pair["count"] for pair in pairs),
        "total": sum(map(sum, matrix)),
        "more": max(0, len(pairs) - (10 if small else 20)),
    }


def calibration(known: Facts) -> dict[str, Any] | None:
    """Return the reliability diagram and its numbers."""
    calibration = known.summary.get("calibration") or {}
    bins = [
        (confidence, accuracy, int(row.get("count") or 0))
        for row in calibration.get("bins") or []
        if (confidence := number(row.get("confidence"))) is not None
        and (accuracy := number(row.get("accuracy"))) is not None
        and row.get("count")
    ]
    if not bins:
        return None
    total = sum(count for *_, count in bins)
    lean = sum(count * (accuracy - confidence) for confidence, accuracy, count in bins) / total
    ece = number(calibration.get("ece"))
    mean = sum(count * confidence for confidence, _, count in bins) / total
    right = sum(count * accuracy for _, accuracy, count in bins) / total
    return {
        "chart": charts.reliability(
            bins, label=f"Reliability diagram, expected calibration error {share(ece)}"
        ),
        "ece": share(ece),
        "mean": share(mean),
        "right": share(right),
        "lean": "says less than it knows" if lean > 0.01 else "promises too much" if lean < -0.01 else "",
        "bins": [(share(c), share(a), count(n)) for c, a, n in bins],
    }


def scatter(known: Facts) -> dict[str, Any] | None:
    """Return predicted over true values of a regression."""
    regression = known.summary.get("regression") or {}
    pairs = [
        (true, said)
        for pair in regression.get("scatter") or []
        if len(pair) == 2 and (true := number(pair[0])) is not None and (said := number(pair[1])) is not None
    ]
    if not pairs:
        return None
    name = visible(regression.get("name") or "the target")
    label = f"Predicted over true values of {name} for {len(pairs)} test pictures"
    return {
        "chart": charts.scatter(pairs, label=label, y_format=axis),
        "name": name,
        "count": len(pairs),
    }


def per_class(known: Facts) -> dict[str, Any] | None:
    """Return the rates of every class, the hardest first."""
    keys = ("precision", "recall", "f1")
    rows = [
        {
            "name": visible(row.get("name", "")),
            "support": int(row.get("support") or 0),
            "values": [number(row.get(key)) for key in keys],
        }
        for row in known.summary.get("per_class") or []
    ]
    rows.sort(key=lambda row: 2 if row["values"][2] is None else row["values"][2])
    return {"rows": rows, "titles": ("Precision", "Recall", "F1")} if rows else None
