"""Two processes give the result of one, to rounding."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

SCRIPT = """
import sys
from pathlib import Path

import torch

from omniconv.data.augment import AugmentConfig
from omniconv.data.batches import Batches
from omniconv.data.preprocess import Preprocess
from omniconv.data.sources import open_images
from omniconv.models.factory import create_model
from omniconv.pipeline.config import Plan
from omniconv.pipeline.train import Trainer, processes
from omniconv.tasks.factory import make_task

torch.set_num_threads(1)
augment = AugmentConfig(crop="pad", erase=0.25, mixup=0.2)
data = open_images("digits")
task = make_task("classification", data.schema.classes, smoothing=0.1)
with processes():
    for network in sys.argv[2:]:
        folder = Path(sys.argv[1]) / network
        folder.mkdir(parents=True, exist_ok=True)
        plan = Plan(
            network=network, size=32, batch=64, epochs=2, optimizer="sgd", lr=0.02, ema=0.9, augment=augment
        )
        torch.manual_seed(0)
        model = create_model(network, num_classes=10, in_chans=1, drop_rate=0.0, drop_path_rate=0.0)
        train = Batches(data, range(128), plan.size, batch_size=64, seed=0)
        val = Batches(data, range(128, 192), plan.size, batch_size=64, seed=0)
        Trainer(model, Preprocess(32, [0.3], [0.3]), task, train, val, plan, seed=0, folder=folder).run()
"""


def processes(script: Path, *arguments: object, count: int) -> None:
    launcher = (
        ["-m", "torch.distributed.run", "--nproc-per-node", str(count), "--standalone"] if count > 1 else []
    )
    command = [sys.executable, *launcher, script, *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Smooth networks: a sum that differs in its last bit can move an input of relu past zero, and what follows
# from that is no rounding error. One has batch norm, one has none.
NETWORKS = ("efficientnet_test", "convnext_test")


def test_two_processes_equal_one(tmp_path: Path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    for count in (1, 2):
        processes(script, tmp_path / str(count), *NETWORKS, count=count)
    for network in NETWORKS:
        ours, theirs = (
            load_file(tmp_path / str(count) / network / "checkpoint.safetensors") for count in (2, 1)
        )
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            scale = value.abs().max().item() if value.is_floating_point() else 0.0
            # What is itself a difference of rounding errors (biases before a norm) has no digits to compare.
            assert (ours[name] - value).abs().max() <= 1e-3 * max(scale, 1e-3), (network, name)


BATCH_NORM = """
import sys

import torch
import torch.distributed as dist
from torch import nn

from omniconv.layers.norm.sync_batch_norm import synchronise_batch_norm

dist.init_process_group("gloo")
torch.manual_seed(0)
x, slope = torch.randn(2, 6, 3, 5, 7, dtype=torch.double)
whole, parts = nn.BatchNorm2d(3).double(), nn.BatchNorm2d(3).double()
synchronise_batch_norm(parts)
own = slice(3 * dist.get_rank(), 3 * dist.get_rank() + 3)
a, b = x.clone().requires_grad_(), x[own].clone().requires_grad_()
(whole(a) * slope).sum().backward()
(parts(b) * slope[own]).sum().backward()
torch.testing.assert_close(b.grad, a.grad[own], rtol=1e-10, atol=1e-12)
for ours, theirs in zip(parts.parameters(), whole.parameters()):
    dist.all_reduce(ours.grad)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)
for ours, theirs in zip(parts.buffers(), whole.buffers()):
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
dist.destroy_process_group()
"""


def test_synchronised_batch_norm_equals_batch_norm_of_all_samples(tmp_path: Path):
    script = tmp_path / "norm.py"
    script.write_text(BATCH_NORM)
    processes(script, count=2)


def test_synchronised_batch_norm_is_batch_norm_with_one_process():
    from torch import nn

    from omniconv.layers.norm.sync_batch_norm import synchronise_batch_norm

    torch.manual_seed(0)
    plain, x = nn.BatchNorm2d(3), torch.randn(4, 3, 5, 7)
    ours = nn.BatchNorm2d(3)
    synchronise_batch_norm(ours)
    torch.testing.assert_close(ours(x), plain(x))
    torch.testing.assert_close(ours.running_var, plain.running_var)


def test_torchrun_makes_one_complete_run(tmp_path: Path, quick_plan: Path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m"]
    arguments = ["omniconv", "fit", "digits", "--plan", str(quick_plan), "--export", "none"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *arguments], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["001"]
    assert (tmp_path / "runs" / "001" / "report.html").exists()
    assert done.stdout.count("report:") == 1
