"""Training that can be stopped anywhere and continues bit for bit.

The state of a run is its weights, the optimizer's moments, the averaged weights and a step number. Everything
random (order, augmentation, dropout) is drawn from generators derived from (seed, step), so there is no random
state to save, and a run resumed from any checkpoint does exactly what the uninterrupted one did.
"""

import copy
import itertools
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from omniconv.core.errors import RefusedError, ResourceError
from omniconv.core.seeds import derive, generator
from omniconv.core.weights import load_weights, save_weights
from omniconv.data.augment import Augment
from omniconv.data.batches import Batches
from omniconv.data.preprocess import Preprocess
from omniconv.deploy.accelerate import accelerate, bears_channels_last
from omniconv.layers.norm.sync_batch_norm import synchronise_batch_norm
from omniconv.pipeline.config import Plan
from omniconv.tasks.base import Task

__all__ = [
    "Interrupted",
    "Trainer",
    "make_optimizer",
    "processes",
    "rank_and_world",
    "schedule",
]

CHECKPOINT_SECONDS = 30.0
MAX_ROLLBACKS = 4


class Interrupted(Exception):
    """Training was stopped by the user; the checkpoint of the last finished step is on disk."""


def schedule(step: int, steps: int, warmup: float) -> float:
    """Return the factor of the learning rate: a linear rise over `warmup`, then a cosine to zero."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def make_optimizer(model: nn.Module, plan: Plan) -> torch.optim.Optimizer:
    """Return the plan's optimizer; one-dimensional parameters (norms, biases, scales) take no decay."""
    decay = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": plan.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    if plan.optimizer == "sgd":
        return torch.optim.SGD(groups, plan.lr, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, plan.lr, betas=(0.9, 0.99))


@contextmanager
def processes() -> Iterator[tuple[int, int]]:
    """Join the other processes if torchrun started this one, and leave them at the end; yields `rank_and_world`."""
    joined = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized()
    if joined:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield rank_and_world()
    finally:
        if joined:
            dist.destroy_process_group()


def rank_and_world() -> tuple[int, int]:
    """Return this process's number and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


class Trainer:
    """Trains one network on one machine or, started by torchrun, on several processes.

    Args:
        model: the network, on its device.
        preprocess: carries the normalisation that training shares with the deployed network.
        task: loss and metrics.
        train, val: batches of pictures; `val` may be None.
        plan: how to train.
        seed: of everything random.
        folder: where `checkpoint.safetensors` and `best.safetensors` are written.
        on_event: called with a dict after every step and epoch, for progress displays.
        log: called with a line of text for the run's log.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocess: Preprocess,
        task: Task,
        train: Batches,
        val: Batches | None,
        plan: Plan,
        *,
        seed: int,
        folder: Path,
        on_event: Callable[[dict[str, Any]], None] = lambda event: None,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.task, self.train, self.val, self.plan = task, train, val, plan
        self.preprocess, self.seed, self.folder = preprocess, seed, folder
        self.on_event, self.log = on_event, log
        self.rank, self.world = rank_and_world()
        if plan.batch % (self.world * plan.accumulate):
            raise RefusedError(
                f"batch {plan.batch} cannot be split over {self.world} processes and "
                f"{plan.accumulate} accumulation parts; choose a multiple of {self.world * plan.accumulate}"
            )
        if self.world > 1:
            model = synchronise_batch_norm(model)
        self.channels_last = plan.channels_last and bears_channels_last(model)
        if self.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model = accelerate(model)
        self.ema = copy.deepcopy(model).eval() if plan.ema else model
        self.runner = DistributedDataParallel(model) if self.world > 1 else model
        self.optimizer = make_optimizer(model, plan)
        self.augment = Augment(plan.augment, task.outputs, task.name)
        self.device = next(model.parameters()).device

        self.step = 0
        self.epochs = plan.epochs
        self.accumulate = plan.accumulate
        self.lr_scale = 1.0
        self.rollbacks = 0
        self.elapsed = 0.0
        self.history: list[dict[str, Any]] = []
        self.losses: list[float] = []
        self.best: float | None = None
        self.best_epoch = -1
        self.signals: list[int] = []
        self.stopping = False
        self.clock = 0.0

    # The state

    @property
    def checkpoint_path(self) -> Path:
        """The file that a stopped run continues from."""
        return self.folder / "checkpoint.safetensors"

    @property
    def best_path(self) -> Path:
        """The file with the weights of the best epoch."""
        return self.folder / "best.safetensors"

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        if self.ema is not self.model:
            tensors |= {f"ema.{name}": value for name, value in self.ema.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {
                f"optimizer.{index}.{key}": value for key, value in state.items() if value is not None
            }
        return tensors

    def save(self) -> None:
        """Write the checkpoint; only the first of several processes does."""
        if self.rank:
            return
        header = {
            "step": self.step,
            "epochs": self.epochs,
            "accumulate": self.accumulate,
            "lr_scale": self.lr_scale,
            "rollbacks": self.rollbacks,
            "elapsed": self.elapsed,
            "history": self.history,
            "losses": self.losses,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "threads": torch.get_num_threads(),
        }
        save_weights(self.checkpoint_path, self._tensors(), header)

    def restore(self) -> None:
        """Continue from the checkpoint; weights, moments, history and step become those of the file."""
        tensors, header = load_weights(self.checkpoint_path)

        def part(prefix: str) -> dict[str, Tensor]:
            return {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}

        self.model.load_state_dict(part("model."))
        if self.ema is not self.model:
            self.ema.load_state_dict(part("ema."))
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in part("optimizer.").items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        for key in ("step", "epochs", "accumulate", "lr_scale", "rollbacks", "elapsed", "history", "losses"):
            setattr(self, key, header[key])
        self.best, self.best_epoch = header["best"], header["best_epoch"]
        if header["threads"] != torch.get_num_threads():
            # Sums are split over threads, so another count would change the last bits.
            torch.set_num_threads(header["threads"])
            self.log(f"continuing with {header['threads']} threads, as the run began")

    # One step

    def _micro_batches(self, step: int, images: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        # Each quarter of a batch has a generator of its own, so two or four processes draw what one would.
        quarters = 4 if len(images) * self.world % 4 == 0 and 4 % self.world == 0 else self.world
        own = quarters // self.world
        parts = zip(images.chunk(own), targets.chunk(own), strict=True)
        augmented = []
        for number, (part, target) in enumerate(parts, self.rank * own):
            random = generator(self.seed, "augment", step, number)
            x = self.preprocess.scale(part.to(self.device))
            augmented.append(self.augment(x, target.to(self.device), random))
        x = self.preprocess.normalise(torch.cat([x for x, _ in augmented]))
        soft = torch.cat([t for _, t in augmented])
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return zip(x.chunk(self.accumulate), soft.chunk(self.accumulate), strict=True)

    def _update(self, step: int, images: Tensor, targets: Tensor) -> float:
        """Make one optimizer step; returns the mean loss of the batch over all processes."""
        torch.manual_seed(derive(self.seed, "network", step, self.rank))
        steps = self.epochs * self.train.steps_per_epoch
        lr = self.plan.lr * self.lr_scale * schedule(step, steps, self.plan.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        # Processes must stop after the same step, so the wish to stop travels with the loss.
        total = torch.tensor([0.0, float(bool(self.signals))], device=self.device)
        for x, soft in self._micro_batches(step, images, targets):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.plan.precision == "bfloat16"):
                outputs = self.runner(x)
            loss = self.task.loss(outputs, soft) / self.accumulate
            loss.backward()
            total[0] += loss.detach()
        if self.world > 1:
            dist.all_reduce(total)
            total[0] /= self.world
        value, self.stopping = float(total[0]), float(total[1]) > 0
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.plan.clip)
        if not (math.isfinite(value) and torch.isfinite(norm)):
            return math.nan
        self.optimizer.step()
        self._average(step)
        return value

    @torch.no_grad()
    def _average(self, step: int) -> None:
        if self.ema is self.model:
            return
        # A short run must forget its random start, so the decay grows with the number of steps.
        decay = min(self.plan.ema, (1 + step) / (10 + step))
        ours, theirs = self.ema.state_dict(), self.model.state_dict()
        floating = [name for name, value in ours.items() if value.is_floating_point()]
        torch._foreach_lerp_([ours[n] for n in floating], [theirs[n] for n in floating], 1 - decay)
        for name in ours.keys() - set(floating):
            ours[name].copy_(theirs[name])

    @torch.no_grad()
    def predict(self, batches: Batches) -> tuple[np.ndarray, np.ndarray, float]:
        """Return predictions, targets and the mean loss of the averaged weights over `batches`."""
        model = self.ema.eval()
        predictions, truths, losses = [], [], 0.0
        for _, images, targets, _ in batches.sequential():
            x = self.preprocess.normalise(self.preprocess.scale(images.to(self.device)))
            if self.channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            outputs = model(x)
            losses += float(self.task.loss(outputs, targets.to(self.device))) * len(targets)
            predictions.append(self.task.predict(outputs).cpu().numpy())
            truths.append(targets.numpy())
        truth = np.concatenate(truths)
        return np.concatenate(predictions), truth, losses / len(truth)

    # The loop

    def run(self) -> None:
        """Train to the end of the plan, from the beginning or from where `restore` left it.

        Raises:
            Interrupted: after Ctrl-C or SIGTERM; the state is on disk.
            RefusedError: if the loss stays non-finite after several roll-backs.
        """
        if not self.checkpoint_path.exists():
            self.save()
        with self._interruptible(), torch.random.fork_rng(devices=[]):
            while self.step < self.epochs * self.train.steps_per_epoch and not self._out_of_patience():
                self._run_epoch()
        self.log(f"trained {self.step} steps in {self.elapsed:.1f} s")

    def _run_epoch(self) -> None:
        """Run the rest of the current epoch; ends early after a roll-back."""
        epoch, start = divmod(self.step, self.train.steps_per_epoch)
        self.model.train()
        self.clock = saved = began = time.monotonic()
        for _, images, targets, _ in self.train.epoch(epoch, start, rank=self.rank, world=self.world):
            try:
                loss = self._update(self.step, images, targets)
            except RuntimeError as error:
                if self.world > 1 or not _out_of_memory(error):
                    raise
                self._halve_batch()
                return
            if math.isnan(loss):
                self._roll_back()
                return
            self.step += 1
            self.losses.append(loss)
            done = self.step - epoch * self.train.steps_per_epoch - start
            speed = done * self.train.batch_size / (time.monotonic() - began)
            self._report_step(epoch, loss, speed)
            if self.step % self.train.steps_per_epoch == 0:
                self._end_epoch(epoch, speed)
                self.save()
            elif self.stopping or time.monotonic() - saved > CHECKPOINT_SECONDS:
                self._count_time()
                self.save()
                saved = time.monotonic()
            if self.stopping:
                raise Interrupted

    def _count_time(self) -> None:
        now = time.monotonic()
        self.elapsed += now - self.clock
        self.clock = now

    def _report_step(self, epoch: int, loss: float, speed: float) -> None:
        left = self.epochs * self.train.steps_per_epoch - self.step
        self.on_event(
            {
                "event": "step",
                "epoch": epoch,
                "epochs": self.epochs,
                "step": self.step,
                "steps": self.epochs * self.train.steps_per_epoch,
                "loss": loss,
                "images_per_second": speed,
                "seconds_left": left * self.plan.batch / speed,
                "metric": self.history[-1]["val_metric"] if self.history else None,
                "metric_name": self.task.main_metric,
            }
        )

    def _end_epoch(self, epoch: int, speed: float) -> None:
        self._count_time()
        row: dict[str, Any] = {
            "epoch": epoch + 1,
            "step": self.step,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": sum(self.losses) / len(self.losses),
            "val_loss": None,
            "val_metric": None,
            "seconds": round(self.elapsed, 2),
            "images_per_second": round(speed, 1),
        }
        self.losses = []
        if self.val is not None:
            predictions, targets, row["val_loss"] = self.predict(self.val)
            row["val_metric"] = self.task.metrics(predictions, targets)[self.task.main_metric]
            self._count_time()
            self.model.train()
            sign = 1 if self.task.higher_is_better else -1
            if self.best is None or sign * row["val_metric"] > sign * self.best:
                self.best, self.best_epoch = row["val_metric"], epoch
                if self.rank == 0:
                    save_weights(self.best_path, self.ema.state_dict(), {"epoch": epoch + 1})
        self.history.append(row)
        self._keep_to_time(epoch)
        self.log(json.dumps(row))
        self.on_event({"event": "epoch", **row, "epochs": self.epochs, "metric_name": self.task.main_metric})

    def _keep_to_time(self, epoch: int) -> None:
        """Cut epochs when the machine turns out slower than planned, so that the schedule still ends at zero."""
        if self.plan.seconds is None:
            return
        # The first epoch decodes and warms up, so the fastest one tells what the rest will take.
        ends = [0.0, *(row["seconds"] for row in self.history)]
        fastest = min(after - before for before, after in itertools.pairwise(ends))
        left = max(0.0, self.plan.seconds - self.elapsed) / max(fastest, 1e-9)
        fit = torch.tensor(min(self.epochs, epoch + 1 + math.floor(left + 0.25)))
        if self.world > 1:
            dist.broadcast(fit, 0)
        if int(fit) < self.epochs:
            self.log(f"slower than planned: {self.epochs} epochs cut to {int(fit)} to keep to the time")
            self.epochs = int(fit)

    def _out_of_patience(self) -> bool:
        done = len(self.history)
        return bool(self.plan.patience) and done - 1 - self.best_epoch >= self.plan.patience and done > 0

    def _roll_back(self) -> None:
        """Return to the last checkpoint with half the learning rate."""
        rollbacks, scale = self.rollbacks + 1, self.lr_scale / 2
        if rollbacks > MAX_ROLLBACKS:
            raise RefusedError(
                f"the loss was not finite {rollbacks} times, last at step {self.step}; the last good weights are "
                f"kept. Try a lower lr than {self.plan.lr * self.lr_scale:g} in plan.yaml"
            )
        bad = self.step
        self._barrier()
        self.restore()
        self.rollbacks, self.lr_scale = rollbacks, scale
        self.save()
        self._warn(f"loss not finite at step {bad}; back to step {self.step} with half the learning rate")

    def _halve_batch(self) -> None:
        """Return to the last checkpoint and compute each batch in twice as many parts."""
        part = self.plan.batch // self.world // self.accumulate
        if part % 2:
            raise ResourceError(
                f"out of memory at batch {part}; choose a smaller size or network in plan.yaml"
            )
        self.optimizer.zero_grad(set_to_none=True)
        accumulate = self.accumulate * 2
        self.restore()
        self.accumulate = accumulate
        self.save()
        self._warn(f"out of memory at batch {part}; continuing at {part // 2} with accumulation {accumulate}")

    def _warn(self, message: str) -> None:
        self.log(message)
        self.on_event({"event": "warning", "message": message})

    def _barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Collect SIGINT and SIGTERM instead of breaking off in the middle of a step; the second one breaks."""

        def note(number: int, frame: object) -> None:
            if self.signals:
                raise KeyboardInterrupt
            self.signals.append(number)

        try:
            previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:
            previous = {}  # not in the main thread: signals go to the caller
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, cast(Any, handler))
