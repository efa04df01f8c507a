"""A run folder: everything that a training leaves behind, and what can be done with it."""

import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from omniconv.core.errors import DataError, UsageError
from omniconv.core.files import atomic_write
from omniconv.core.version import __version__
from omniconv.core.weights import load_weights, read_header, save_weights
from omniconv.data.preprocess import Preprocess
from omniconv.data.schema import Schema
from omniconv.models.backbone import Backbone
from omniconv.models.factory import create_model
from omniconv.pipeline.config import FitConfig, Plan
from omniconv.pipeline.predict import Predictor
from omniconv.tasks.base import Task
from omniconv.tasks.factory import make_task

__all__ = ["Run", "new_run_folder"]


def new_run_folder(out: str | os.PathLike[str] | None) -> Path:
    """Make the folder of a new run: `out`, or the next number below `runs/`.

    Raises:
        UsageError: if `out` exists and is not empty.
    """
    if out is not None:
        folder = Path(out)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError(
                f"{folder} exists already; choose another --out, or go on with: omniconv fit --resume {folder}"
            )
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    root = Path("runs")
    root.mkdir(exist_ok=True)
    while True:
        numbers = [int(p.name) for p in root.iterdir() if p.name.isdigit()]
        folder = root / f"{max(numbers, default=0) + 1:03d}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue  # another process was faster
        return folder


class Run:
    """A finished or interrupted training.

    Args:
        path: the run folder.

    Raises:
        UsageError: if it is not a run folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not (self.path / "config.yaml").is_file():
            raise UsageError(f"{self.path} is not a run folder (no config.yaml in it)")

    def __repr__(self) -> str:
        return f"Run({os.fspath(self.path)!r})"

    # What it holds

    @cached_property
    def config(self) -> FitConfig:
        """What was asked."""
        return FitConfig.load(self.path / "config.yaml")

    @cached_property
    def plan(self) -> Plan:
        """What was decided."""
        return Plan.load(self.path / "plan.yaml")

    @property
    def weights_path(self) -> Path:
        """The trained network."""
        return self.path / "model.safetensors"

    @cached_property
    def header(self) -> dict[str, Any]:
        """The header of the weight file: network, classes, preprocessing."""
        if not self.weights_path.exists():
            raise UsageError(
                f"{self.path} has no trained network yet; go on with: omniconv fit --resume {self.path}"
            )
        header = read_header(self.weights_path)
        if "network" not in header:
            raise DataError(
                f"{self.weights_path} does not say which network it holds; train it with omniconv fit"
            )
        return header

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What the report shows, for machines; {} if the run was not evaluated."""
        path = self.path / "summary.json"
        return json.loads(path.read_text()) if path.exists() else {}

    @property
    def report(self) -> Path:
        """The report."""
        return self.path / "report.html"

    # The network

    @property
    def model(self) -> Backbone:
        """The trained network, in eval mode."""
        model = create_model(
            self.header["network"],
            num_classes=self.header["num_classes"],
            in_chans=self.header["in_chans"],
            **self.header["options"],
        )
        if "kept" in self.header:
            model = _without_units(
                model, self.header["kept"], (self.header["in_chans"], *self.header["traced"])
            )
        tensors, _ = load_weights(self.weights_path)
        model.load_state_dict(tensors)
        return model.eval()

    @cached_property
    def preprocess(self) -> Preprocess:
        """From raw pixels to the network's input."""
        return Preprocess.from_dict(self.header["preprocess"])

    @cached_property
    def task(self) -> Task:
        """The task that it was trained for."""
        standard = self.header.get("regression") or {}
        return make_task(self.header["task"], tuple(self.header["classes"]), **standard)

    @cached_property
    def predictor(self) -> Predictor:
        """The network with everything around it."""
        return Predictor(self.model, self.preprocess, self.task, self.header["in_chans"], self.path.name)

    def save_model(self, tensors: dict[str, torch.Tensor], header: dict[str, Any]) -> None:
        """Write the trained network."""
        save_weights(self.weights_path, tensors, header)
        for name in ("header", "predictor", "preprocess", "task"):
            self.__dict__.pop(name, None)

    def save_summary(self, summary: dict[str, Any]) -> None:
        """Write `summary.json`."""
        atomic_write(self.path / "summary.json", json.dumps(summary, indent=1, default=_plain) + "\n")
        self.__dict__.pop("summary", None)

    # What can be done with it

    def predict(self, data: str | os.PathLike[str]) -> list[dict[str, Any]]:
        """Return a prediction for every picture of a folder or file; see `omniconv.pipeline.use.predict`."""
        from omniconv.pipeline.use import predict

        return predict(self, data)

    def evaluate(self, data: str | os.PathLike[str], **how: Any) -> dict[str, Any]:
        """Return metrics on labelled pictures; see `omniconv.pipeline.use.evaluate`."""
        from omniconv.pipeline.use import evaluate

        return evaluate(self, data, **how)

    def explain(
        self, picture: str | os.PathLike[str], out: str | os.PathLike[str] | None = None
    ) -> dict[str, Any]:
        """Write where the network looks in a picture; see `omniconv.pipeline.use.explain`."""
        from omniconv.pipeline.use import explain

        return explain(self, picture, out)

    def export(self, *formats: str) -> dict[str, Any]:
        """Write and verify "torch", "onnx", "openvino" or "triton"; see `omniconv.pipeline.use.export`."""
        from omniconv.pipeline.use import export

        return export(self, formats or ("torch", "onnx"))

    def bench(self) -> dict[str, Any]:
        """Time the network in every form that it has; see `omniconv.pipeline.use.bench`."""
        from omniconv.pipeline.use import bench

        return bench(self)

    def compress(self, **budget: Any) -> dict[str, Any]:
        """Make the network smaller; see `omniconv.pipeline.shrink.compress`."""
        from omniconv.pipeline.shrink import compress

        return compress(self, **budget)


def _without_units(model: Backbone, kept: dict[str, list[int]], shape: tuple[int, ...]) -> Backbone:
    """Return the network without the channels that compression removed; `kept` says by group which are left."""
    from omniconv.compress.structure.graph import trace_structure

    structure = trace_structure(model, shape)
    keep = {name: torch.zeros(structure.groups[name].size, dtype=torch.bool) for name in kept}
    for name, units in kept.items():
        keep[name][units] = True
    return structure.remove(model, keep)


def model_header(plan: Plan, schema: Schema, task: Task, preprocess: Preprocess) -> dict[str, Any]:
    """Return the header that makes a weight file usable on its own."""
    header: dict[str, Any] = {
        "omniconv": __version__,
        "network": plan.network,
        "options": plan.options,
        "in_chans": schema.channels,
        "num_classes": task.outputs,
        "task": task.name,
        "classes": list(task.classes),
        "preprocess": preprocess.to_dict(),
    }
    if task.name == "regression":
        header["regression"] = {"mean": task.mean.tolist(), "std": task.std.tolist()}  # type: ignore[attr-defined]
    return header


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"cannot write {type(value).__name__} as JSON")
