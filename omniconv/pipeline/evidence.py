"""The pictures of a report: what the network got right, what it got wrong, and where it looked."""

import contextlib
import json
from collections import Counter
from collections.abc import Sequence
from itertools import islice, zip_longest
from typing import Any

import numpy as np

from omniconv.core.errors import UsageError
from omniconv.core.files import atomic_write
from omniconv.data.sources import ImageData
from omniconv.inspect.filters import first_layer_filters
from omniconv.inspect.picture import overlay_png, to_png
from omniconv.pipeline.baseline import targets_of
from omniconv.pipeline.report import render_report
from omniconv.pipeline.run import Run

__all__ = ["explain_run", "write_report"]

EACH = 8


def explain_run(
    run: Run,
    data: ImageData,
    splits: dict[str, list[int]],
    predictions: np.ndarray,
    targets: np.ndarray,
) -> None:
    """Draw some training pictures and telling test pictures with their activation maps into the run folder."""
    folder, test = run.path / "pictures", splits["test"]
    index: dict[str, list[dict[str, Any]]] = {
        "samples": [
            _draw_sample(run, data, position, f"samples-{number}")
            for number, position in enumerate(_samples(run.task.name, data, splits["train"]))
        ]
    }
    for kind, positions in _choose(run.task.name, predictions, targets).items():
        index[kind] = [
            _draw(run, data, test[position], predictions[position], targets[position], f"{kind}-{number}")
            for number, position in enumerate(positions)
        ]
    # Networks of another geometry have no convolution whose filters were pictures.
    with contextlib.suppress(UsageError):
        first_layer_filters(run.predictor.model).save(folder / "filters.png")
    atomic_write(folder / "index.json", json.dumps(index, indent=1) + "\n")


def _samples(task: str, data: ImageData, train: Sequence[int]) -> list[int]:
    """Return training pictures: of every class in turn, or spread over all."""
    if task != "classification":
        return [train[int(i)] for i in np.linspace(0, len(train) - 1, min(EACH, len(train))).round()]
    of_class: dict[Any, list[int]] = {}
    for position in train:
        of_class.setdefault(data.samples[position].target, []).append(position)
    groups = [of_class[key] for key in sorted(of_class)]
    turns = (position for turn in zip_longest(*groups) for position in turn if position is not None)
    return list(islice(turns, max(EACH, min(len(groups), 2 * EACH))))


def _choose(task: str, predictions: np.ndarray, targets: np.ndarray) -> dict[str, list[int]]:
    """Return positions of test pictures: the surest right answers, the surest wrong ones, and the usual mistakes."""
    if task == "classification":
        guess, sure = predictions.argmax(1), predictions.max(1)
        right = guess == targets
        # One of each class in turn, so that the best pictures are not all of the easiest class.
        best = [int(i) for i in np.argsort(-sure) if right[i]]
        seen: set[int] = set()
        varied = [i for i in best if not (targets[i] in seen or seen.add(int(targets[i])))]
        worst = [int(i) for i in np.argsort(-sure) if not right[i]]
        pairs = Counter((int(targets[i]), int(guess[i])) for i in worst).most_common()
        confused = [next(i for i in worst if (targets[i], guess[i]) == pair) for pair, _ in pairs]
        return {
            "best": [*varied, *(i for i in best if i not in varied)][:EACH],
            "worst": worst[:EACH],
            "confused": confused[:EACH],
        }
    if task == "multilabel":
        error = np.abs(predictions - targets).max(1)
    else:
        error = np.abs((predictions - targets) / (targets.std(0) + 1e-12)).mean(1)
    order = np.argsort(error).tolist()
    return {"best": order[:EACH], "worst": order[::-1][:EACH]}


def _draw_sample(run: Run, data: ImageData, index: int, name: str) -> dict[str, Any]:
    sample = data.samples[index]
    picture = to_png(data.read(index), run.preprocess.low, run.preprocess.high)
    atomic_write(run.path / "pictures" / f"{name}.png", picture)
    return {
        "id": sample.id,
        "image": f"{name}.png",
        "cam": None,
        "target": _target_text(run, targets_of(data, [index])[0]),
        "prediction": None,
        "confidence": None,
    }


def _draw(
    run: Run, data: ImageData, index: int, prediction: np.ndarray, target: Any, name: str
) -> dict[str, Any]:
    image = data.read(index)
    preprocess = run.preprocess
    folder = run.path / "pictures"
    atomic_write(folder / f"{name}.png", to_png(image, preprocess.low, preprocess.high))
    heat = run.predictor.activation_maps(image[None])[0]
    atomic_write(folder / f"{name}-map.png", overlay_png(image, heat, preprocess.low, preprocess.high))
    said = run.task.describe(prediction)
    return {
        "id": data.samples[index].id,
        "image": f"{name}.png",
        "cam": f"{name}-map.png",
        "target": _target_text(run, target),
        "prediction": said["label"],
        "confidence": said.get("confidence"),
    }


def _target_text(run: Run, target: Any) -> str:
    classes = run.task.classes
    if run.task.name == "classification":
        return classes[int(target)]
    if run.task.name == "multilabel":
        return "|".join(name for name, value in zip(classes, target, strict=True) if value > 0.5)
    return ", ".join(f"{value:.4g}" for value in np.atleast_1d(target))


def write_report(run: Run) -> None:
    """Write `report.html` from `summary.json` and the pictures of the run folder."""
    folder = run.path / "pictures"
    pictures: dict[str, Any] = {}
    if (folder / "index.json").exists():
        for kind, items in json.loads((folder / "index.json").read_text()).items():
            pictures[kind] = [
                {
                    **item,
                    "image": (folder / item["image"]).read_bytes(),
                    "cam": (folder / item["cam"]).read_bytes() if item["cam"] else None,
                }
                for item in items
            ]
    if (folder / "filters.png").exists():
        pictures["filters"] = (folder / "filters.png").read_bytes()
    atomic_write(run.report, render_report(run.summary, pictures))
