"""The main job, from a folder of pictures to a trained, explained, exported network."""

import csv
import io
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from omniconv.core.errors import DataError, OmniconvError, RefusedError, ResourceError, UsageError
from omniconv.core.files import atomic_write
from omniconv.core.seeds import derive
from omniconv.core.units import bytes_text, seconds_text
from omniconv.core.version import __version__
from omniconv.core.weights import load_weights
from omniconv.data.audit import audit
from omniconv.data.batches import Batches
from omniconv.data.preprocess import Preprocess
from omniconv.data.schema import Problem
from omniconv.data.sources import ImageData
from omniconv.data.splits import load_splits, make_splits, save_splits
from omniconv.design.cost import count_cost
from omniconv.models.factory import create_model, get_variant
from omniconv.models.weights import Pretrained, read_pretrained
from omniconv.pipeline import use
from omniconv.pipeline.baseline import LinearProbe, targets_of
from omniconv.pipeline.config import Plan
from omniconv.pipeline.evidence import explain_run, write_report
from omniconv.pipeline.plan import make_plan
from omniconv.pipeline.run import Run, model_header
from omniconv.pipeline.train import Interrupted, Trainer, rank_and_world
from omniconv.pipeline.wording import Metric
from omniconv.tasks.base import Task
from omniconv.tasks.factory import make_task

__all__ = ["Fit", "resumable"]

BAD_LIMIT = 0.01
Event = Callable[[dict[str, Any]], None]


def device_of_this_process() -> torch.device:
    """Return the accelerator of this process, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


class Fit:
    """One training with everything around it; a stage writes what the next one, or a resumed run, reads.

    Args:
        run: the run folder; `config.yaml` is in it.
        data: the pictures that `config.yaml` names, as `open_labelled` returns them.
        on_event: called with dicts for progress displays: {"event": "stage" | "step" | "epoch" | "warning"...}.
    """

    def __init__(self, run: Run, data: ImageData, on_event: Event = lambda event: None) -> None:
        self.run, self.data, self.config, self.folder = run, data, run.config, run.path
        self.rank, self.world = rank_and_world()
        self.on_event = on_event if self.rank == 0 else lambda event: None
        self.device = device_of_this_process()
        self.seconds: dict[str, float] = {}
        self.notes: list[str] = []
        self.history: list[dict[str, Any]] = []

    # Small helpers

    def log(self, line: str) -> None:
        """Add a line with the time to the run's log."""
        if self.rank == 0:
            with open(self.folder / "log.txt", "a") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def _stage(self, name: str) -> "_Stage":
        return _Stage(self, name)

    def _say(self, message: str) -> None:
        self.log(message)
        self.on_event({"event": "note", "message": message})

    # The job

    def __call__(self) -> Run:
        """Do what is left of the job and return the finished run.

        Raises:
            Interrupted: after Ctrl-C; the run can predict and be resumed.
            OmniconvError: with the reason when something cannot be done.
        """
        if self.rank == 0:
            # What a killed process was writing when it died.
            for leftover in self.folder.rglob(".*.tmp"):
                leftover.unlink(missing_ok=True)
        self.log(f"omniconv {__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")
        data = self.data
        with self._stage("audit"):
            splits, problems = self._split(data)
        task = self._task(data, splits)
        probe: LinearProbe | None = None
        with self._stage("plan"):
            if not (self.folder / "plan.yaml").exists():
                probe = LinearProbe(data, splits["train"], task, self.config.seed)
                if self.rank == 0:
                    self._plan(data, splits, task, probe)
            self._wait()
            plan = self.run.plan
            task = self._task(data, splits, plan.smoothing)
        preprocess = self._preprocess(data, splits["train"], plan)
        self.on_event({"event": "plan", "plan": plan.model_dump(mode="json")})
        with self._stage("train"):
            self._train(data, splits, task, plan, preprocess)
        if self.rank:
            self._wait()
            return self.run
        summary = self._evaluate(data, splits, task, plan, problems, probe)
        summary = self._deploy(data, splits, plan, summary)
        self._finish(summary)
        self._wait()
        return self.run

    def _wait(self) -> None:
        if self.world > 1:
            dist.barrier()

    # Data

    def _split(self, data: ImageData) -> tuple[dict[str, list[int]], list[Problem]]:
        path, found = self.folder / "splits.csv", self.folder / "problems.json"
        if not (path.exists() and found.exists()):
            if self.rank == 0:
                self._make_splits(data, path, found)
            self._wait()
        header = json.loads(found.read_text())
        if header["fingerprint"] != data.fingerprint:
            raise DataError(f"{data.name} has changed since this run began; start a new run")
        return load_splits(path, data), [
            Problem(p["kind"], p["message"], tuple(p["ids"]), p["severity"]) for p in header["problems"]
        ]

    def _make_splits(self, data: ImageData, path: Path, found: Path) -> None:
        def progress(done: int, count: int) -> None:
            self.on_event({"event": "progress", "stage": "audit", "done": done, "count": count})

        problems = audit(data, progress=progress)
        bad = sorted({i for problem in problems if problem.kind == "unreadable" for i in problem.ids})
        if bad:
            rows = [f"{p.ids[0] if p.ids else ''}\t{p.message}" for p in problems if p.kind == "unreadable"]
            self._write_csv("bad.csv", ["id", "reason"], [row.split("\t", 1) for row in rows])
            message = f"{len(bad)} of {len(data)} images unreadable"
            if len(bad) > BAD_LIMIT * len(data) and not self.config.skip_bad:
                raise DataError(f"{message} (limit 1%): {self.folder / 'bad.csv'}. Go on with --skip-bad")
            self._say(f"{message}; they are left out: {self.folder / 'bad.csv'}")
        for problem in problems:
            if problem.kind != "unreadable" and problem.severity != "info":
                self._say(problem.message)
        splits = make_splits(data, problems, seed=self.config.seed)
        for name in ("train", "test"):
            if not splits[name]:
                raise DataError(f"{data.name} has too few readable pictures for a {name} split; add more")
        save_splits(path, data, splits)
        content = {"fingerprint": data.fingerprint, "problems": [asdict(problem) for problem in problems]}
        atomic_write(found, json.dumps(content, indent=1) + "\n")

    def _task(self, data: ImageData, splits: dict[str, list[int]], smoothing: float = 0.0) -> Task:
        name = data.schema.task
        targets = targets_of(data, splits["train"]) if name == "regression" else None
        return make_task(name, data.schema.classes, smoothing=smoothing, train_targets=targets)

    def _preprocess(self, data: ImageData, train: Sequence[int], plan: Plan) -> Preprocess:
        """Return the preprocessing with the channel statistics of up to 2,000 training pictures."""
        low, high = data.schema.low, data.schema.high
        step = -(-len(train) // 2000)
        total = torch.zeros(2, data.schema.channels, dtype=torch.float64)
        count = 0
        for index in train[::step]:
            x = (data.read(index).double() - low) / (high - low)
            total += torch.stack([x.sum((1, 2)), (x * x).sum((1, 2))])
            count += x.shape[1] * x.shape[2]
        mean = total[0] / count
        std = (total[1] / count - mean**2).clamp_min(0).sqrt().clamp_min(1e-3)
        preprocess = Preprocess(plan.size, mean.tolist(), std.tolist(), low, high)
        return preprocess.to(self.device)

    # Planning and training

    def _plan(self, data: ImageData, splits: dict[str, list[int]], task: Task, probe: LinearProbe) -> None:
        config = self.config
        if config.plan:
            plan = Plan.load(config.plan)
            get_variant(plan.network)
        else:
            held_out = splits["val"] or splits["test"]
            plan = make_plan(
                data.schema,
                len(splits["train"]),
                task.outputs,
                config,
                device=self.device,
                symmetry=probe.symmetry(held_out),
                latency=self._latency_of(data, splits["train"], task) if config.latency else None,
            )
        # Every process takes an equal share of every batch.
        share = self.world * plan.accumulate
        if plan.batch % share:
            plan = plan.model_copy(update={"batch": max(1, plan.batch // share) * share})
        plan.save(
            self.folder / "plan.yaml",
            comment="How this run is trained. Edit a copy and give it back: omniconv fit DATA --plan FILE",
        )

    def _latency_of(self, data: ImageData, train: Sequence[int], task: Task) -> Callable[[str, int], float]:
        """Return a function that measures the exported, untrained form of (network, size) on one picture."""
        schema = data.schema
        picture = data.read(train[0])

        def latency(network: str, size: int) -> float:
            with torch.random.fork_rng(devices=[]):
                model = create_model(network, num_classes=task.outputs, in_chans=schema.channels)
            ones = [1.0] * schema.channels
            preprocess = Preprocess(size, [0.0] * schema.channels, ones, schema.low, schema.high)
            return use.exported_latency(model.eval(), preprocess, picture)

        return latency

    def _train(
        self,
        data: ImageData,
        splits: dict[str, list[int]],
        task: Task,
        plan: Plan,
        preprocess: Preprocess,
    ) -> None:
        config = self.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(config.seed, "weights"))
            model = create_model(
                plan.network,
                num_classes=task.outputs,
                in_chans=data.schema.channels,
                **plan.options,
                pretrained=self._pretrained(),
            ).to(self.device)
        how: dict[str, Any] = {"seed": config.seed, "workers": config.workers}
        train = Batches(data, splits["train"], plan.size, batch_size=plan.batch, **how)
        val = Batches(data, splits["val"], plan.size, batch_size=256, **how) if splits["val"] else None
        trainer = Trainer(
            model, preprocess, task, train, val, plan,
            seed=config.seed, folder=self.folder, on_event=self._watch, log=self.log,
        )  # fmt: skip
        if trainer.checkpoint_path.exists():
            trainer.restore()
            self.history = list(trainer.history)
            if trainer.step:
                self._say(
                    f"continuing at step {trainer.step}, epoch {len(trainer.history) + 1} of {trainer.epochs}"
                )
        try:
            trainer.run()
        except Interrupted:
            self._keep_network(trainer, data, task, plan, preprocess)
            raise Interrupted(
                f"stopped in epoch {len(trainer.history) + 1} of {trainer.epochs}; {self.folder} can predict as it "
                f"is, and goes on with: omniconv fit --resume {self.folder}"
            ) from None
        except RefusedError:
            self._keep_network(trainer, data, task, plan, preprocess)
            raise
        self._keep_network(trainer, data, task, plan, preprocess)

    def _pretrained(self) -> Pretrained | Literal[False]:
        """Return the weights to start from; a run that goes on has its own."""
        source = self.config.pretrained
        if source is None or (self.folder / "checkpoint.safetensors").exists():
            return False
        weights = read_pretrained(source, trust=self.config.trust)
        self._say(f"starting from {source}, its classifier left out where the classes differ")
        return weights

    def _watch(self, event: dict[str, Any]) -> None:
        if event["event"] == "epoch":
            self.history.append({column: event[column] for column in _COLUMNS})
            self._write_metrics()
        if event["event"] == "warning":
            self.notes.append(event["message"])
        self.on_event(event)

    def _write_metrics(self) -> None:
        self._write_csv("metrics.csv", _COLUMNS, [[row[c] for c in _COLUMNS] for row in self.history])

    def _keep_network(
        self, trainer: Trainer, data: ImageData, task: Task, plan: Plan, preprocess: Preprocess
    ) -> None:
        """Write the weights of the best epoch, or the latest ones while there is none."""
        if self.rank:
            return
        self.history = trainer.history
        self._write_metrics()
        if trainer.best is not None and trainer.best_path.exists():
            tensors, _ = load_weights(trainer.best_path)
        else:
            tensors = trainer.ema.state_dict()
        header = model_header(plan, data.schema, task, preprocess)
        self.run.save_model(tensors, {**header, "epoch": trainer.best_epoch + 1, "epochs": trainer.epochs})

    # What it is worth

    def _evaluate(
        self,
        data: ImageData,
        splits: dict[str, list[int]],
        task: Task,
        plan: Plan,
        problems: list[Problem],
        probe: LinearProbe | None,
    ) -> dict[str, Any]:
        config, test, schema = self.config, splits["test"], data.schema
        with self._stage("evaluate"):
            predictor = self.run.predictor
            predictions = predictor.predict_tensors(data.read(index) for index in test)
            targets = targets_of(data, test)
            result = task.evaluate(predictions, targets, config.seed)
            probe = probe or LinearProbe(data, splits["train"], task, config.seed)
            guess = task.majority(targets_of(data, splits["train"]), len(test))
            baselines = {
                "majority": task.evaluate(guess, targets, config.seed)["metrics"],
                "linear": task.evaluate(probe.predict(test), targets, config.seed)["metrics"],
            }
        with self._stage("explain"):
            explain_run(self.run, data, splits, predictions, targets)
        cost = count_cost(predictor.model, (schema.channels, plan.size, plan.size))
        return {
            "omniconv": __version__,
            "name": self.folder.name,
            "created": time.strftime("%Y-%m-%d %H:%M"),
            "command": " ".join(["omniconv", *sys.argv[1:]]) if sys.argv[0].endswith("omniconv") else "",
            "path": os.fspath(self.folder),
            "task": task.name,
            "data": {
                "source": config.data,
                "samples": len(data),
                "classes": list(schema.classes),
                "sizes": {name: len(indices) for name, indices in splits.items()},
                "counts": {name: _counts(data, indices) for name, indices in splits.items()},
                "channels": schema.channels,
                "height": schema.height,
                "width": schema.width,
                "problems": [
                    {"kind": p.kind, "message": p.message, "severity": p.severity, "count": len(p.ids)}
                    for p in problems
                ],
                "fingerprint": data.fingerprint,
            },
            "plan": plan.model_dump(mode="json"),
            "history": self.history,
            "main_metric": task.main_metric,
            **result,
            "baselines": baselines,
            "cost": {
                "parameters": cost.parameters,
                "macs": cost.macs,
                "file_bytes": self.run.weights_path.stat().st_size,
            },
        }

    def _deploy(
        self, data: ImageData, splits: dict[str, list[int]], plan: Plan, summary: dict[str, Any]
    ) -> dict[str, Any]:
        """Export, quantize and time the network; what cannot be done is noted, not hidden."""
        with self._stage("export"):
            try:
                exported = use.export(self.run, self.config.export, data=data, splits=splits)
                summary["export"] = exported
            except (ResourceError, RefusedError) as error:
                self.notes.append(str(error))
                self._say(str(error))
            if "onnx" in self.config.export and "export" in summary:
                try:
                    summary["int8"] = use.quantize(self.run, data=data, splits=splits)
                except OmniconvError as error:
                    self.notes.append(str(error))
                    self._say(str(error))
        with self._stage("bench"):
            summary["cost"]["latency_ms"] = use.bench(self.run, picture=data.read(splits["test"][0]))[
                "latency_ms"
            ]
        return summary

    def _finish(self, summary: dict[str, Any]) -> None:
        shortfall = self._shortfall(summary)
        summary["seconds"] = {name: round(value, 2) for name, value in self.seconds.items()}
        summary["notes"] = [*self.notes, *([shortfall] if shortfall else [])]
        self.run.save_summary(summary)
        write_report(self.run)
        self.log(f"finished: {json.dumps(summary['metrics'][summary['main_metric']])}")
        if shortfall:
            raise RefusedError(f"{shortfall}; the run is kept: {self.run.report}")

    def _shortfall(self, summary: dict[str, Any]) -> str | None:
        """Return what is said when the finished network misses the latency or the size, else None."""
        config, files = self.config, summary.get("export", {}).get("files", [])
        sizes = [f["bytes"] for f in files if f["format"] == "onnx"]
        sizes += [summary["int8"]["bytes_after"]] if "int8" in summary else []
        metric = Metric(summary["main_metric"])
        value = metric.text(summary["metrics"][summary["main_metric"]]["value"])
        value = value if metric.unit else f"{metric.label} {value}"
        if config.bytes and sizes and min(sizes) > config.bytes:
            return (
                f"{bytes_text(config.bytes)} is unreachable here; "
                f"smallest is {bytes_text(min(sizes))} at {value}"
            )
        times = [
            row["median"] / 1e3
            for name, row in summary["cost"].get("latency_ms", {}).items()
            if name in ("onnxruntime", "int8") and row["batch"] == 1
        ]
        if config.latency and times and min(times) > config.latency:
            return (
                f"{seconds_text(config.latency)} is unreachable here; "
                f"fastest is {seconds_text(min(times))} at {value}"
            )
        return None

    def _write_csv(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        buffer = io.StringIO()
        writer = csv.writer(buffer)
        writer.writerow(columns)
        writer.writerows(rows)
        atomic_write(self.folder / name, buffer.getvalue())


_COLUMNS = (
    "epoch", "step", "lr", "train_loss", "val_loss", "val_metric", "seconds", "images_per_second",
)  # fmt: skip


class _Stage:
    """Times a stage and tells the display about it."""

    def __init__(self, fit: Fit, name: str) -> None:
        self.fit, self.name = fit, name

    def __enter__(self) -> None:
        self.began = time.monotonic()
        self.fit.log(f"stage {self.name}")
        self.fit.on_event({"event": "stage", "stage": self.name})

    def __exit__(self, *exception: object) -> None:
        self.fit.seconds[self.name] = time.monotonic() - self.began


def _counts(data: ImageData, indices: Sequence[int]) -> dict[str, int]:
    """Return how many pictures every class has; for other tasks, how many pictures there are."""
    classes, task = data.schema.classes, data.schema.task
    if task == "classification":
        counted = Counter(data.samples[index].target for index in indices)
        return {name: counted[number] for number, name in enumerate(classes)}
    if task == "multilabel" and indices:
        sums = targets_of(data, indices).sum(0)
        return {name: int(value) for name, value in zip(classes, sums, strict=True)}
    return {"all": len(indices)}


def resumable(folder: str | os.PathLike[str]) -> Run:
    """Return the run of a folder that can be resumed.

    Raises:
        UsageError: if it is no run folder, or its run is finished.
    """
    run = Run(folder)
    if (run.path / "summary.json").exists() and run.report.exists():
        raise UsageError(f"{run.path} is finished; see {run.report}")
    return run
