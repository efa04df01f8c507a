"""What is done with a trained run: predict, evaluate, explain, export, quantize, time."""

import csv
import io
import json
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from omniconv.core.errors import DataError, OmniconvError
from omniconv.core.files import atomic_write
from omniconv.data.decode import read_image
from omniconv.data.preprocess import Preprocess
from omniconv.data.sources import ImageData, open_images
from omniconv.data.splits import load_splits
from omniconv.deploy.export import export_model
from omniconv.deploy.int8 import quantize_int8
from omniconv.deploy.latency import eager_candidate, exported_candidate, measure
from omniconv.layers.conv.reparam import reparameterize
from omniconv.pipeline.baseline import targets_of
from omniconv.pipeline.check import open_labelled
from omniconv.pipeline.run import Run
from omniconv.tasks.regression import Regression

__all__ = [
    "bench",
    "evaluate",
    "explain",
    "export",
    "exported_latency",
    "predict",
    "quantize",
    "write_predictions",
]

CALIBRATION = 200


def _tensors(
    run: Run, data: ImageData, indices: Sequence[int], bad: list[dict[str, str]]
) -> tuple[list[int], list[Tensor]]:
    """Read pictures as the run's network takes them; what cannot be read is added to `bad`."""
    kept, images = [], []
    for index in indices:
        path = data.path(index)
        try:
            if path is not None:
                image = run.predictor.tensor(read_image(path, name=data.samples[index].id))
            else:
                image = run.predictor.tensor(data.read(index).permute(1, 2, 0).numpy())
        except DataError as error:
            bad.append({"id": data.samples[index].id, "error": str(error)})
            continue
        kept.append(index)
        images.append(image)
    return kept, images


def predict(run: Run, source: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return one row for every picture of a folder, table, array or single file, in their order.

    Each row holds `id` and the prediction (`label`, `confidence`, `probabilities`, or `values`), or `id` and
    `error` for a picture that cannot be read. Labels of the data are not looked at.

    Raises:
        DataError: if there is no picture, or none that can be read.
    """
    data = open_images(source)
    rows: dict[int, dict[str, Any]] = {}
    for start in range(0, len(data), 256):
        bad: list[dict[str, str]] = []
        kept, images = _tensors(run, data, range(start, min(start + 256, len(data))), bad)
        predictions = run.predictor.predict_tensors(images)
        for index, row in zip(kept, predictions, strict=True):
            rows[index] = {"id": data.samples[index].id, **run.task.describe(row)}
        failed = {row["id"]: row for row in bad}
        for index in range(start, min(start + 256, len(data))):
            if index not in rows:
                rows[index] = failed[data.samples[index].id]
    if all("error" in row for row in rows.values()):
        raise DataError(
            f"none of {len(rows)} pictures in {source} can be read; the first: {rows[0]['error']}"
        )
    return [rows[index] for index in range(len(data))]


def write_predictions(rows: Sequence[dict[str, Any]], out: str | os.PathLike[str]) -> None:
    """Write predictions as CSV, or as JSON if the name ends so."""
    if Path(out).suffix == ".json":
        atomic_write(out, json.dumps(list(rows), indent=1) + "\n")
        return
    numbers: list[str] = []
    for row in rows:
        for name in row.get("probabilities") or row.get("values") or {}:
            if name not in numbers:
                numbers.append(name)
    confident = any("confidence" in row for row in rows)
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(["id", "prediction", *(["confidence"] if confident else []), *numbers, "error"])
    for row in rows:
        values = row.get("probabilities") or row.get("values") or {}
        cells = [row["id"], row.get("label", "")]
        cells += [f"{row['confidence']:.6f}" if "confidence" in row else ""] if confident else []
        cells += [f"{values[name]:.6g}" if name in values else "" for name in numbers]
        writer.writerow([*cells, row.get("error", "")])
    atomic_write(out, buffer.getvalue())


def evaluate(
    run: Run,
    source: str | os.PathLike[str],
    *,
    labels: str | None = None,
    target: str | list[str] | None = None,
) -> dict[str, Any]:
    """Return metrics with 95% intervals on labelled pictures (the test part, if the data names one).

    Raises:
        DataError: if there are no labels, or classes that the run does not know.
    """
    data = open_images(source, labels=labels, task=run.header["task"], target=target)
    if data.schema.task == "none":
        raise DataError(f"{source} has no labels to compare with; give --labels FILE")
    unknown = sorted(set(data.schema.classes) - set(run.task.classes))
    if run.task.name != "regression" and unknown:
        raise DataError(
            f"{source} has classes that {run.path} was not trained on: {', '.join(unknown[:5])}; "
            f"it knows {', '.join(run.task.classes[:10])}"
        )
    held_out = [i for i, sample in enumerate(data.samples) if sample.split == "test"]
    bad: list[dict[str, str]] = []
    kept, images = _tensors(run, data, held_out or range(len(data)), bad)
    if not kept:
        raise DataError(f"none of the pictures in {source} can be read; the first: {bad[0]['error']}")
    targets = targets_of(data, kept)
    if run.task.name == "classification":
        targets = np.array([run.task.classes.index(name) for name in data.schema.classes])[targets]
    elif run.task.name == "multilabel":
        wide = np.zeros((len(kept), run.task.outputs), np.float32)
        wide[:, [run.task.classes.index(name) for name in data.schema.classes]] = targets
        targets = wide
    result = run.task.evaluate(run.predictor.predict_tensors(images), targets, run.config.seed)
    return {"source": os.fspath(source), "pictures": len(kept), "unreadable": bad, **result}


def explain(
    run: Run, picture: str | os.PathLike[str], out: str | os.PathLike[str] | None = None
) -> dict[str, Any]:
    """Write a picture under the activation map of its likeliest class; returns the prediction and the path.

    Args:
        run: the run.
        picture: a picture file.
        out: the PNG to write; by default one in the run folder, named after the picture.
    """
    image = read_image(Path(picture))
    target = Path(out) if out else run.path / "explain" / f"{Path(picture).stem}.png"
    try:
        prediction = run.predictor.predict_images([image])[0]
    except DataError as error:
        raise DataError(f"{picture}: {error}") from None
    atomic_write(target, run.predictor.explain_image(image))
    return {**prediction, "picture": os.fspath(picture), "map": os.fspath(target)}


def _data_of(run: Run) -> tuple[ImageData, dict[str, list[int]]]:
    data = open_labelled(run.config)
    return data, load_splits(run.path / "splits.csv", data)


def export(
    run: Run,
    formats: Sequence[str],
    *,
    data: ImageData | None = None,
    splits: dict[str, list[int]] | None = None,
) -> dict[str, Any]:
    """Write deployable forms into `export/`, each verified on real test pictures; returns what was written.

    "triton" is a model repository for NVIDIA's Triton Inference Server around the ONNX file, in `export/triton`.
    """
    wanted = [kind for kind in formats if kind != "triton"]
    if "triton" in formats and "onnx" not in wanted:
        wanted.append("onnx")
    if data is None or splits is None:
        data, splits = _data_of(run)
    samples = [data.read(index) for index in splits["test"][:32]]
    report = export_model(
        run.model,
        run.preprocess,
        samples,
        run.path / "export",
        formats=tuple(wanted),
        output=run.task.output_kind,  # type: ignore[arg-type]
        units=(run.task.mean.tolist(), run.task.std.tolist()) if isinstance(run.task, Regression) else None,
        names=list(run.task.classes),
        metadata={"network": run.header["network"], "run": run.path.name},
    )
    result = report.to_dict()
    if "triton" in formats:
        from omniconv.deploy.serve.triton import write_triton_repository

        folder = run.path / "export"
        name = re.sub(r"[^\w.-]", "_", f"{run.header['network']}-{run.path.resolve().name}")
        made = write_triton_repository(
            folder / "model.onnx", folder / "triton", name, classes=run.task.classes
        )
        result["triton"] = os.fspath(made)
    return result


def quantize(
    run: Run,
    *,
    data: ImageData | None = None,
    splits: dict[str, list[int]] | None = None,
    max_drop: float = 0.01,
) -> dict[str, Any]:
    """Write `export/model.int8.onnx`, calibrated on training pictures and judged on validation pictures.

    Raises:
        RefusedError: if it is slower than float, or its score (accuracy, mean average precision or R squared)
            falls by more than `max_drop`.
    """
    if data is None or splits is None:
        data, splits = _data_of(run)
    calibration = [data.read(index).numpy() for index in splits["train"][:CALIBRATION]]
    judged = (splits["val"] or splits["train"])[:2000]
    targets = targets_of(data, judged)
    pictures = [data.read(index).numpy() for index in judged]

    def score(call: Any) -> float:
        outputs = np.concatenate([call(picture[None]) for picture in pictures])
        return run.task.score(outputs, targets)

    folder = run.path / "export"
    report = quantize_int8(
        folder / "model.onnx", calibration, folder / "model.int8.onnx", evaluate=score, max_drop=max_drop
    )
    return report.to_dict()


def bench(run: Run, *, picture: Tensor | None = None) -> dict[str, Any]:
    """Time the network, eager and in every exported form, on one picture and on 32, side by side."""
    if picture is None:
        data, splits = _data_of(run)
        picture = data.read(splits["test"][0])
    model = _WithPreprocessing(run.preprocess, reparameterize(run.model))
    forms = {
        "torch.export": run.path / "export" / "model.pt2",
        "onnxruntime": run.path / "export" / "model.onnx",
        "int8": run.path / "export" / "model.int8.onnx",
        "openvino": run.path / "export" / "model.xml",
    }
    rows: dict[str, dict[str, Any]] = {}
    for batch in (1, 32):
        images = picture[None].repeat(batch, 1, 1, 1)
        candidates = {"eager": eager_candidate(model, images)}
        for name, path in forms.items():
            if path.exists():
                candidates[name] = exported_candidate(path, images.numpy())
        for name, latency in measure(candidates, rounds=20).items():
            rows[name if batch == 1 else f"{name}, 32 pictures"] = {**asdict(latency), "batch": batch}
    return {"run": os.fspath(run.path), "threads": torch.get_num_threads(), "latency_ms": rows}


class _WithPreprocessing(nn.Module):
    """Eager counterpart of the exported forms: from raw pixels to outputs."""

    def __init__(self, preprocess: Preprocess, model: nn.Module) -> None:
        super().__init__()
        self.preprocess, self.model = preprocess, model

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs of raw pictures."""
        return self.model(self.preprocess(x))


def exported_latency(model: nn.Module, preprocess: Preprocess, picture: Tensor) -> float:
    """Return the median seconds that one picture takes in ONNX Runtime, or in eager PyTorch where that is missing."""
    whole = _WithPreprocessing(preprocess, reparameterize(model))
    images = picture[None]
    with tempfile.TemporaryDirectory(prefix="omniconv-") as folder:
        try:
            export_model(model, preprocess, [picture], folder, formats=("onnx",))
            candidate = exported_candidate(Path(folder) / "model.onnx", images.numpy())
        except OmniconvError:
            candidate = eager_candidate(whole, images)
        return measure({"it": candidate}, rounds=20)["it"].median / 1e3
