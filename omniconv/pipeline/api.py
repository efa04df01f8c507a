"""The main job as Python calls: `run = omniconv.fit("pets/")`, `run.predict("new/")`, `run.export("onnx")`."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from omniconv.core.config import closest
from omniconv.core.errors import UsageError
from omniconv.core.units import parse_bytes, parse_seconds
from omniconv.data.schema import Problem
from omniconv.deploy.runtimes import FORMATS
from omniconv.models.factory import create_model, get_variant
from omniconv.models.weights import read_pretrained
from omniconv.pipeline.check import check_data, open_labelled
from omniconv.pipeline.config import FitConfig, Plan
from omniconv.pipeline.fit import Fit, resumable
from omniconv.pipeline.run import Run, new_run_folder
from omniconv.pipeline.train import processes

__all__ = ["check", "fit", "load", "resume", "start"]


def check(data: str | os.PathLike[str], **how: Any) -> list[Problem]:
    """Return every problem found in a data set, the gravest first; nothing is written.

    Args:
        data: folder, table, array file, or "digits".
        **how: `labels`, `task`, `target`, `group`, as for `fit`.
    """
    return check_data(data, **how)[1]


def fit(
    data: str | os.PathLike[str],
    *,
    task: str | None = None,
    model: str | None = None,
    pretrained: str | os.PathLike[str] | None = None,
    trust: bool = False,
    labels: str | os.PathLike[str] | None = None,
    target: str | list[str] | None = None,
    group: str | None = None,
    latency_ms: float | None = None,
    size: str | int | None = None,
    time: str | float | None = None,
    epochs: int | None = None,
    plan: str | os.PathLike[str] | None = None,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    skip_bad: bool = False,
    export: Sequence[str] = ("torch", "onnx"),
    workers: int = 2,
    on_event: Callable[[dict[str, Any]], None] = lambda event: None,
) -> Run:
    """Train a network on a data set and evaluate, explain and export it.

    Args:
        data: folder, table, array file, or "digits" for scikit-learn's handwritten digits.
        task: "classification", "multilabel" or "regression"; guessed from the labels by default.
        model: network by name; planned by default.
        pretrained: weights to start from: a safetensors file, a PyTorch checkpoint, or `hub:OWNER/NAME`; without
            `model` the network is the one that the file names.
        trust: load a checkpoint although it may run code.
        labels: table of labels for a folder of pictures.
        target: label column or columns of the table.
        group: column whose groups stay within one split.
        latency_ms: milliseconds that the exported network may take for one picture.
        size: bytes, or text such as "5MB", that the exported network may take.
        time: seconds, or text such as "2h", for training.
        epochs: passes over the training pictures.
        plan: an edited `plan.yaml` to follow.
        seed: of splits, weights, order and augmentation.
        out: run folder; by default the next number below `runs/`.
        skip_bad: go on when more than 1% of the pictures are unreadable.
        export: formats among "torch", "onnx" and "openvino".
        workers: threads that decode pictures.
        on_event: called with dicts that tell the progress.

    Raises:
        OmniconvError: one of its subclasses, with what to do next.
    """
    config = FitConfig.parse(
        {
            "data": os.fspath(data),
            "labels": None if labels is None else os.fspath(labels),
            "task": task,
            "target": target,
            "group": group,
            "model": model,
            "pretrained": None if pretrained is None else os.fspath(pretrained),
            "trust": trust,
            "plan": None if plan is None else os.fspath(plan),
            "epochs": epochs,
            "seconds": parse_seconds(time) if isinstance(time, str) else time,
            "latency": None if latency_ms is None else latency_ms / 1e3,
            "bytes": parse_bytes(size) if isinstance(size, str) else size,
            "seed": seed,
            "skip_bad": skip_bad,
            "export": list(export),
            "workers": workers,
        },
        "fit",
    )
    return start(config, out, on_event)


def start(
    config: FitConfig,
    out: str | os.PathLike[str] | None = None,
    on_event: Callable[[dict[str, Any]], None] = lambda event: None,
) -> Run:
    """Begin a run of `config` in a new folder; see `fit`."""
    # Whatever cannot succeed is refused before a run folder is made.
    if config.model:
        get_variant(config.model)
    if config.plan:
        get_variant(Plan.load(config.plan).network)
    if config.pretrained:
        config = _with_network(config)
    for name in config.export:
        if name not in FORMATS:
            raise UsageError(f"no export format {name!r}{closest(name, list(FORMATS))}")
    data = open_labelled(config)
    with processes() as (rank, world):
        folder = [""]
        if rank == 0:
            made = new_run_folder(out)
            config.save(made / "config.yaml", comment="What was asked; `omniconv fit --resume` reads it.")
            folder = [os.fspath(made)]
        if world > 1:
            dist.broadcast_object_list(folder)
        return Fit(Run(folder[0]), data, on_event)()


def _with_network(config: FitConfig) -> FitConfig:
    """Return `config` with the network of its pretrained weights, which must fit."""
    weights = read_pretrained(config.pretrained or "", trust=config.trust)
    if config.plan:
        plan = Plan.load(config.plan)
        create_model(plan.network, pretrained=weights, **plan.options)
        return config
    name = config.model or weights.network
    if not name:
        raise UsageError(f"{config.pretrained} does not say which network it is for; name it with --model")
    create_model(name, pretrained=weights)
    return config.model_copy(update={"model": name})


def resume(
    folder: str | os.PathLike[str], on_event: Callable[[dict[str, Any]], None] = lambda event: None
) -> Run:
    """Continue a stopped run, bit for bit as if it had not been stopped."""
    run = resumable(folder)
    with processes():
        return Fit(run, open_labelled(run.config), on_event)()


def load(folder: str | os.PathLike[str]) -> Run:
    """Return a finished or stopped run."""
    return Run(folder)
