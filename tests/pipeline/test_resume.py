"""A run that is stopped at any moment and resumed ends with the weights of the uninterrupted one, bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from omniconv.core.seeds import derive
from omniconv.data.augment import AugmentConfig
from omniconv.data.batches import Batches
from omniconv.data.preprocess import Preprocess
from omniconv.data.sources import open_images
from omniconv.models.factory import create_model
from omniconv.pipeline import train as training
from omniconv.pipeline.config import Plan
from omniconv.pipeline.train import Trainer
from omniconv.tasks.factory import make_task

PLAN = Plan(
    network="resnet_test",
    size=16,
    batch=64,
    epochs=3,
    optimizer="sgd",
    lr=0.1,
    ema=0.9,
    options={"drop_rate": 0.2, "drop_path_rate": 0.1},
    augment=AugmentConfig(crop="pad", erase=0.25, rotate=10, mixup=0.2),
)


class Killed(BaseException):
    """Stands for a process that is gone between two steps."""


def trainer(
    folder: Path, plan: Plan, workers: int = 0, stop_at: int | None = None, count: int = 300
) -> Trainer:
    data = open_images("digits")
    torch.manual_seed(derive(0, "weights"))
    model = create_model(plan.network, num_classes=10, in_chans=1, **plan.options)
    task = make_task("classification", data.schema.classes, smoothing=plan.smoothing)
    train = Batches(data, range(count), plan.size, batch_size=plan.batch, seed=0, workers=workers)
    val = Batches(data, range(count, count + 100), plan.size, batch_size=64, seed=0)

    def on_event(event):
        if event["event"] == "step" and event["step"] == stop_at:
            raise Killed

    folder.mkdir(exist_ok=True)
    return Trainer(
        model,
        Preprocess(plan.size, [0.3], [0.3]),
        task,
        train,
        val,
        plan,
        seed=0,
        folder=folder,
        on_event=on_event,
    )


def run_killed(folder: Path, plan: Plan, stops: list[int], workers: int = 0) -> Trainer:
    """Train with a kill after each step of `stops`; every start is a new trainer that knows only the files."""
    for stop in [*stops, None]:
        one = trainer(folder, plan, workers, stop)
        if one.checkpoint_path.exists():
            one.restore()
        try:
            one.run()
        except Killed:
            continue
        return one
    raise AssertionError("never finished")


def assert_same(a: Path, b: Path) -> None:
    ours, theirs = load_file(a), load_file(b)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "change",
    [{}, {"optimizer": "adamw", "lr": 2e-3, "accumulate": 2}, {"precision": "bfloat16", "ema": 0.0}],
    ids=["sgd", "adamw-accumulated", "bfloat16"],
)
def test_any_step(tmp_path, monkeypatch, workers, change):
    plan = PLAN.model_copy(update=change)
    whole = trainer(tmp_path / "whole", plan, workers)
    whole.run()
    # A checkpoint after every second step or so: kills fall on and between checkpoints, within and between epochs.
    ticks = iter(range(100_000))
    monkeypatch.setattr(training.time, "monotonic", lambda: float(next(ticks)) * 6)
    stops = sorted(random.Random(len(change)).sample(range(1, 12), 5))
    broken = run_killed(tmp_path / "broken", plan, stops, workers)
    assert_same(whole.checkpoint_path, broken.checkpoint_path)
    assert_same(whole.best_path, broken.best_path)
    same = ("epoch", "step", "lr", "train_loss", "val_loss", "val_metric")
    assert [[row[k] for k in same] for row in whole.history] == [
        [row[k] for k in same] for row in broken.history
    ]


def test_loss_that_is_not_finite_rolls_back_and_halves_the_learning_rate(tmp_path):
    one = trainer(tmp_path / "run", PLAN)
    forward, calls = one.model.forward, []

    def broken_once(x):
        calls.append(None)
        return forward(x) * (float("nan") if len(calls) == 7 else 1.0)

    one.model.forward = broken_once
    one.run()
    assert one.rollbacks == 1
    assert one.lr_scale == 0.5
    assert one.step == 12
    assert len(one.history) == 3
    assert all(torch.isfinite(p).all() for p in one.model.parameters())


def test_loss_that_stays_not_finite_is_refused_and_leaves_good_weights(tmp_path):
    one = trainer(tmp_path / "run", PLAN)
    forward = one.model.forward
    one.model.forward = lambda x: forward(x) * float("nan")
    with pytest.raises(training.RefusedError, match="not finite 5 times"):
        one.run()
    assert all(torch.isfinite(value.float()).all() for value in load_file(one.checkpoint_path).values())


def test_out_of_memory_halves_the_batch_and_accumulates(tmp_path):
    one = trainer(tmp_path / "run", PLAN.model_copy(update={"options": {}}))
    forward = one.model.forward

    def small_memory(x):
        if len(x) > 16 and one.model.training:
            raise torch.OutOfMemoryError("out of memory")
        return forward(x)

    one.model.forward = small_memory
    messages = []
    one.on_event = lambda event: messages.append(event["message"]) if event["event"] == "warning" else None
    one.run()
    assert one.accumulate == 4
    assert one.step == 12
    assert messages == [
        "out of memory at batch 64; continuing at 32 with accumulation 2",
        "out of memory at batch 32; continuing at 16 with accumulation 4",
    ]


def test_accumulated_gradient_is_that_of_the_whole_batch(tmp_path):
    # Without batch norm, parts of a batch sum to the batch.
    plan = PLAN.model_copy(
        update={"network": "convnext_test", "options": {}, "size": 32, "epochs": 1, "ema": 0.0}
    )
    ends = []
    for accumulate in (1, 4):
        one = trainer(
            tmp_path / str(accumulate), plan.model_copy(update={"accumulate": accumulate}), count=128
        )
        one.run()
        ends.append(torch.cat([p.flatten() for p in one.model.parameters()]))
    torch.testing.assert_close(*ends, rtol=0, atol=2e-5)


def test_signal_saves_the_finished_step(tmp_path):
    one = trainer(tmp_path / "run", PLAN)
    one.on_event = lambda event: os.kill(os.getpid(), signal.SIGINT) if event.get("step") == 5 else None
    with pytest.raises(training.Interrupted):
        one.run()
    again = trainer(tmp_path / "run", PLAN)
    again.restore()
    assert again.step in (5, 6)
    again.run()
    whole = trainer(tmp_path / "whole", PLAN)
    whole.run()
    assert_same(whole.checkpoint_path, again.checkpoint_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("workers", [0, 2])
def test_kill_9(tmp_path, workers):
    """Ten kills of real processes at random moments, from the first import to the last file."""
    plan = tmp_path / "plan.yaml"
    PLAN.model_copy(update={"epochs": 6}).save(plan)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}

    def begin(folder: Path) -> list[str]:
        command = [sys.executable, "-m", "omniconv", "fit"]
        if (folder / "config.yaml").exists():
            return [*command, "--resume", str(folder)]
        return [
            *command,
            "digits",
            "--plan",
            str(plan),
            "--out",
            str(folder),
            "--export",
            "none",
            "--workers",
            str(workers),
        ]

    whole = tmp_path / "whole"
    began = time.monotonic()
    subprocess.run(begin(whole), check=True, env=env, capture_output=True)
    length = time.monotonic() - began

    chance, kills, rounds, log = random.Random(workers), 0, 0, tmp_path / "log.txt"
    while kills < 10:
        rounds += 1
        broken = tmp_path / f"broken-{rounds}"
        # A kill may come after the last file: then there is nothing left to resume.
        while not ((broken / "summary.json").exists() and (broken / "report.html").exists()):
            with open(log, "wb") as output:
                process = subprocess.Popen(begin(broken), env=env, stdout=output, stderr=output)
            try:
                process.wait(chance.uniform(0.1, 1.0) * length if kills < 10 else 300)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
                for file in broken.rglob("*.safetensors"):
                    load_file(file)
            else:
                assert process.returncode == 0, log.read_text()
        assert_same(broken / "model.safetensors", whole / "model.safetensors")
        assert not list(broken.rglob(".*.tmp"))
