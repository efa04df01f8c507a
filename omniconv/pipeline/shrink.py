"""`compress`: channels removed, weights set to zero, int8, alone and together, tried on the target and measured.

What is kept is a run folder of its own, beside which the original stays as it was.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from omniconv.compress.prune.global_magnitude import global_magnitude
from omniconv.compress.prune.masks import hold_masks
from omniconv.compress.prune.structured import choose_within, unit_norms
from omniconv.compress.sparse_file import save_sparse
from omniconv.compress.structure.graph import Structure, trace_structure
from omniconv.core.errors import OmniconvError, RefusedError
from omniconv.core.files import atomic_write
from omniconv.core.units import bytes_text, seconds_text
from omniconv.core.weights import save_weights
from omniconv.data.batches import Batches
from omniconv.data.sources import ImageData
from omniconv.data.splits import load_splits
from omniconv.deploy.latency import exported_candidate, measure
from omniconv.pipeline.baseline import targets_of
from omniconv.pipeline.check import open_labelled
from omniconv.pipeline.run import Run, new_run_folder
from omniconv.pipeline.trade_off import render_trade_off
from omniconv.pipeline.train import Trainer
from omniconv.pipeline.use import export, quantize

__all__ = ["compress"]

# Shares of multiply-adds and of weights that go; later ones are tried as long as the earlier ones stay good.
SLIM = (0.3, 0.5, 0.65, 0.8)
SPARSE = (0.5, 0.7, 0.8, 0.9)


@dataclass
class Trial:
    """One way that was tried.

    Attributes:
        form: what it is: "float32", "int8", "slim" (channels removed), "slim int8" or "sparse" (zeros).
        removed: share of multiply-adds or of weights that are gone.
        bytes: size of the file that is deployed.
        latency: median seconds for one picture, None where nothing was timed.
        value: the score on the validation pictures: accuracy, mean average precision or R squared.
        folder: where it lies.
        path: the deployed file.
    """

    form: str
    removed: float
    bytes: int
    latency: float | None
    value: float
    folder: Path
    path: Path

    @property
    def name(self) -> str:
        """What it is, for people."""
        return f"{self.form} -{self.removed:.0%}" if self.removed else self.form


def compress(
    run: Run,
    *,
    size: int | None = None,
    latency: float | None = None,
    max_drop: float = 0.01,
    out: str | os.PathLike[str] | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Return what was tried, and keep the best that meets the budget as a run folder of its own.

    Tried are int8; networks without a rising share of their channels, each fine-tuned, in float and int8; and, unless
    a latency is asked for, global pruning to rising sparsity, each time fine-tuned under its masks. Every form is
    judged on the validation pictures. Without a budget the smallest file within `max_drop` is kept.

    Args:
        run: a trained run; nothing in it changes but the new folder `compressed`.
        size: bytes that the deployed file may take.
        latency: seconds that it may take for one picture.
        max_drop: largest loss of the score, as a share (0.01 is one point of accuracy).
        out: folder to write; by default `compressed` in the run folder.
        log: called with a line about every trial.

    Raises:
        RefusedError: if nothing meets the budget; the message says what comes nearest.
    """
    target = Path(out) if out is not None else run.path / "compressed"
    data = open_labelled(run.config)
    splits = load_splits(run.path / "splits.csv", data)
    if not (run.path / "export" / "model.onnx").exists():
        export(run, ("onnx",), data=data, splits=splits)
    with tempfile.TemporaryDirectory(prefix="omniconv-compress-") as scratch:
        search = _Search(run, data, splits, max_drop, Path(scratch), log)
        search.try_all(sparse=latency is None)
        kept = _choose(search.trials, size, latency, max_drop)
        folder = new_run_folder(target)
        shutil.copytree(kept.folder, folder, dirs_exist_ok=True)
    result = {
        "run": os.fspath(folder),
        "path": os.fspath(folder / kept.path),
        "metric": {"regression": "r2"}.get(run.task.name, run.task.main_metric),
        "max_drop": max_drop,
        "tried": [
            {
                "form": t.form,
                "removed": t.removed,
                "bytes": t.bytes,
                "latency": t.latency,
                "value": t.value,
                "path": os.fspath(folder / t.path) if t is kept else None,
            }
            for t in search.trials
        ],
        "notes": search.notes,
    }
    atomic_write(folder / "compress.json", json.dumps(result, indent=1) + "\n")
    atomic_write(folder / "compress.html", render_trade_off(run.path.name, result))
    return result


@dataclass
class _Search:
    """Everything that the trials share."""

    run: Run
    data: ImageData
    splits: dict[str, list[int]]
    max_drop: float
    scratch: Path
    log: Callable[[str], None]
    trials: list[Trial] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def try_all(self, *, sparse: bool) -> None:
        path = Path("export") / "model.onnx"
        self._add("float32", 0.0, self.run.path, path, self._score(self.run))
        folder = _copy(self.run, self.scratch / "int8")
        shutil.copytree(self.run.path / "export", folder / "export")
        shutil.copy2(self.run.weights_path, folder)
        self._try_int8("int8", 0.0, folder)
        for share, folder in self._slim():
            export(Run(folder), ("onnx",), data=self.data, splits=self.splits)
            good = self._add("slim", share, folder, path, self._score(Run(folder)))
            twin = self.scratch / f"slim-int8-{share}"
            shutil.copytree(folder, twin)
            self._try_int8("slim int8", share, twin)
            if not good:
                break
        self._time_all()
        # Zeros do not make dense kernels faster, only files smaller.
        for share in SPARSE if sparse else ():
            folder = _copy(self.run, self.scratch / f"sparse-{share}")
            model, _ = global_magnitude(self.run.model, share, min_weights=16)
            save_sparse(folder / "model.safetensors", self._tune(model, hold=True), self.run.header)
            if not self._add("sparse", share, folder, Path("model.safetensors"), self._score(Run(folder))):
                break

    def _slim(self) -> Iterator[tuple[float, Path]]:
        """Yield run folders of networks with fewer and fewer channels, fine-tuned."""
        model, header = self.run.model, self.run.header
        if "kept" in header:
            self.notes.append("channels were removed already; compress the original run to remove more")
            return
        shape = (header["in_chans"], self.run.plan.size, self.run.plan.size)
        structure = trace_structure(model, shape)
        if not structure.groups:
            self.notes.append(f"no channels of {header['network']} can be removed")
            return
        scores = unit_norms(model, structure)
        for share in SLIM:
            try:
                keep = _choose_units(structure, scores, share)
            except ValueError as error:
                self.notes.append(f"slim: {error}")
                return
            folder = _copy(self.run, self.scratch / f"slim-{share}")
            kept = {name: mask.nonzero().flatten().tolist() for name, mask in keep.items() if not mask.all()}
            tensors = self._tune(structure.remove(model, keep))
            save_weights(folder / "model.safetensors", tensors, {**header, "kept": kept, "traced": shape[1:]})
            yield share, folder

    def _try_int8(self, form: str, removed: float, folder: Path) -> None:
        try:
            report = quantize(Run(folder), data=self.data, splits=self.splits, max_drop=self.max_drop)
        except OmniconvError as error:
            self.notes.append(f"{form} -{removed:.0%}: {error}" if removed else str(error))
            self.log(self.notes[-1])
            return
        self._add(form, removed, folder, Path("export") / "model.int8.onnx", report["score_after"])

    def _add(self, form: str, removed: float, folder: Path, path: Path, value: float) -> bool:
        """Note a trial; return whether it is good enough to go on from."""
        trial = Trial(form, removed, (folder / path).stat().st_size, None, value, folder, path)
        self.trials.append(trial)
        self.log(f"{trial.name}: {bytes_text(trial.bytes)}, {trial.value:.4f}")
        return self.trials[0].value - value <= self.max_drop

    def _time_all(self) -> None:
        """Time all that is exported in the same rounds, so that a slow moment of the machine hits everything."""
        picture = self.data.read(self._judged[0])[None].numpy()
        exported = {trial.name: trial for trial in self.trials if trial.path.suffix == ".onnx"}
        runs = {
            name: exported_candidate(trial.folder / trial.path, picture) for name, trial in exported.items()
        }
        for name, latency in measure(runs, rounds=50).items():
            exported[name].latency = latency.median / 1e3
            self.log(f"{name}: {seconds_text(latency.median / 1e3)} a picture")

    @property
    def _judged(self) -> list[int]:
        return self.splits["val"] or self.splits["test"]

    def _score(self, candidate: Run) -> float:
        predictions = candidate.predictor.predict_tensors(self.data.read(index) for index in self._judged)
        return candidate.task.score(predictions, targets_of(self.data, self._judged))

    def _tune(self, model: nn.Module, *, hold: bool = False) -> dict[str, Any]:
        """Fine-tune for a quarter of the run's epochs (`hold`: zeros stay zero) and return the state."""
        run, plan = self.run, self.run.plan
        plan = plan.model_copy(
            update={
                "epochs": max(2, plan.epochs // 4),
                "lr": plan.lr / 5,
                "warmup": 0.0,
                "patience": 0,
                "seconds": None,
            }
        )
        seed, how = run.config.seed, {"seed": run.config.seed, "workers": run.config.workers}
        train = Batches(self.data, self.splits["train"], plan.size, batch_size=plan.batch, **how)
        with tempfile.TemporaryDirectory(prefix="omniconv-tune-") as scratch:
            trainer = Trainer(
                model, run.preprocess, run.task, train, None, plan, seed=seed, folder=Path(scratch)
            )
            with hold_masks(model, trainer.optimizer) if hold else contextlib.nullcontext():
                trainer.run()
            return trainer.ema.state_dict()


def _copy(run: Run, folder: Path) -> Path:
    """Make a run folder with everything of `run` but its network."""
    folder.mkdir(parents=True)
    for name in ("config.yaml", "plan.yaml", "splits.csv", "problems.json"):
        shutil.copy2(run.path / name, folder)
    return folder


def _choose_units(structure: Structure, scores: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Return which units stay: sixteens, which fill the registers of kernels, or eights in narrow networks."""
    try:
        return choose_within(structure, scores, share, scope="network", multiple=16)
    except ValueError:
        return choose_within(structure, scores, share, scope="network", multiple=8)


def _choose(trials: list[Trial], size: int | None, latency: float | None, max_drop: float) -> Trial:
    original, others = trials[0], trials[1:]
    good = [t for t in others if original.value - t.value <= max_drop]
    fitting = [
        t
        for t in good
        if (size is None or t.bytes <= size)
        and (latency is None or (t.latency is not None and t.latency <= latency))
    ]
    if fitting:
        # With a budget the best network inside it; without one the smallest.
        if size is None and latency is None:
            return min(fitting, key=lambda t: t.bytes)
        return max(fitting, key=lambda t: t.value)
    wanted = " and ".join(
        [*([bytes_text(size)] if size else []), *([seconds_text(latency)] if latency else [])]
    )
    if not others:
        raise RefusedError("nothing could be compressed; see the log for what was tried")
    nearest = min(good or others, key=lambda t: (t.latency or 0.0) if latency else t.bytes)
    cost = seconds_text(nearest.latency or 0) if latency else bytes_text(nearest.bytes)
    raise RefusedError(
        f"{wanted or 'a smaller network'} is unreachable within a drop of {max_drop:.1%}; nearest is "
        f"{nearest.name}: {cost} at {nearest.value:.4f} ({original.value:.4f} before); nothing written"
    )
