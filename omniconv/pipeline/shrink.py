"""`compress`: global magnitude pruning with a short fine-tuning, and static int8, tried and measured.

What is kept is a run folder of its own, beside which the original stays as it was.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omniconv.compress.prune.global_magnitude import global_magnitude
from omniconv.compress.prune.masks import hold_masks
from omniconv.compress.sparse_file import save_sparse
from omniconv.core.errors import OmniconvError, RefusedError
from omniconv.core.files import atomic_write
from omniconv.core.units import bytes_text, seconds_text
from omniconv.data.batches import Batches
from omniconv.data.sources import ImageData
from omniconv.data.splits import load_splits
from omniconv.deploy.latency import exported_candidate, measure
from omniconv.pipeline.baseline import targets_of
from omniconv.pipeline.check import open_labelled
from omniconv.pipeline.run import Run, new_run_folder
from omniconv.pipeline.train import Trainer
from omniconv.pipeline.use import export, quantize

__all__ = ["compress"]

SPARSITIES = (0.5, 0.7, 0.8, 0.9)


@dataclass
class Trial:
    """One way that was tried.

    Attributes:
        form: what it is.
        sparsity: share of zero weights.
        bytes: size of the file that is deployed.
        latency: median seconds for one picture, None where nothing was timed.
        value: the score on the validation pictures: accuracy, mean average precision or R squared.
        folder: where it lies.
        path: the deployed file.
    """

    form: str
    sparsity: float
    bytes: int
    latency: float | None
    value: float
    folder: Path
    path: Path


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

    Tried are int8, and global pruning to rising sparsity, each time fine-tuned under its masks; every form is
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
        trials, notes = _try_all(run, data, splits, size, latency, max_drop, Path(scratch), log)
        kept = _choose(trials, size, latency, max_drop)
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
                "sparsity": t.sparsity,
                "bytes": t.bytes,
                "latency": t.latency,
                "value": t.value,
                "path": os.fspath(folder / t.path) if t is kept else None,
            }
            for t in trials
        ],
        "notes": notes,
    }
    atomic_write(folder / "compress.json", json.dumps(result, indent=1) + "\n")
    return result


def _try_all(
    run: Run,
    data: ImageData,
    splits: dict[str, list[int]],
    size: int | None,
    latency: float | None,
    max_drop: float,
    scratch: Path,
    log: Callable[[str], None],
) -> tuple[list[Trial], list[str]]:
    judged = splits["val"] or splits["test"]
    notes: list[str] = []

    def score(candidate: Run) -> float:
        predictions = candidate.predictor.predict_tensors(data.read(index) for index in judged)
        return candidate.task.score(predictions, targets_of(data, judged))

    picture = data.read(judged[0])[None].numpy()

    def timed(path: Path) -> float:
        return measure({"it": exported_candidate(path, picture)}, rounds=20)["it"].median / 1e3

    float_path = run.path / "export" / "model.onnx"
    original = Trial(
        "float32", 0.0, float_path.stat().st_size, timed(float_path), score(run), run.path, float_path
    )
    trials = [original]
    log(_line(original))

    try:
        folder = _copy(run, scratch / "int8")
        (folder / "export").mkdir()
        shutil.copy2(float_path, folder / "export")
        shutil.copy2(run.weights_path, folder)
        report = quantize(Run(folder), data=data, splits=splits, max_drop=max_drop)
        path = Path("export") / "model.int8.onnx"
        speed, value = report["latency_after"] / 1e3, report["score_after"]
        trials.append(Trial("int8", 0.0, report["bytes_after"], speed, value, folder, path))
        log(_line(trials[-1]))
    except OmniconvError as error:
        notes.append(str(error))
        log(str(error))
    if latency is not None:
        # Zeros do not make dense kernels faster, so pruning has nothing to offer here.
        return trials, notes

    for sparsity in SPARSITIES:
        folder = _copy(run, scratch / f"pruned-{sparsity}")
        _prune(run, data, splits, sparsity, folder)
        pruned = Run(folder)
        path = Path("model.safetensors")
        trial = Trial(
            "pruned", sparsity, pruned.weights_path.stat().st_size, None, score(pruned), folder, path
        )
        trials.append(trial)
        log(_line(trial))
        if original.value - trial.value > max_drop:
            break
    return trials, notes


def _line(trial: Trial) -> str:
    speed = f", {seconds_text(trial.latency)}" if trial.latency else ""
    return f"{trial.form} {trial.sparsity:.0%} sparse: {bytes_text(trial.bytes)}{speed}, {trial.value:.4f}"


def _copy(run: Run, folder: Path) -> Path:
    """Make a run folder with everything of `run` but its network."""
    folder.mkdir(parents=True)
    for name in ("config.yaml", "plan.yaml", "splits.csv", "problems.json"):
        shutil.copy2(run.path / name, folder)
    return folder


def _prune(run: Run, data: ImageData, splits: dict[str, list[int]], sparsity: float, folder: Path) -> None:
    """Prune the run's network, fine-tune it for an eighth of its epochs, and write it packed."""
    plan = run.plan.model_copy(
        update={
            "epochs": max(1, run.plan.epochs // 8),
            "lr": run.plan.lr / 5,
            "warmup": 0.0,
            "patience": 0,
            "seconds": None,
        }
    )
    model, _ = global_magnitude(run.model, sparsity, min_weights=16)
    seed, how = run.config.seed, {"seed": run.config.seed, "workers": run.config.workers}
    train = Batches(data, splits["train"], plan.size, batch_size=plan.batch, **how)
    with tempfile.TemporaryDirectory(prefix="omniconv-tune-") as scratch:
        trainer = Trainer(model, run.preprocess, run.task, train, None, plan, seed=seed, folder=Path(scratch))
        with hold_masks(model, trainer.optimizer):
            trainer.run()
        save_sparse(folder / "model.safetensors", trainer.ema.state_dict(), run.header)


def _choose(
    trials: list[Trial],
    size: int | None,
    latency: float | None,
    max_drop: float,
) -> Trial:
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
        f"{nearest.form} {nearest.sparsity:.0%} sparse: {cost} at {nearest.value:.4f} "
        f"({original.value:.4f} before); nothing written"
    )
