"""`omniconv fit` against a plain ResNet-18 and a plain PyTorch loop, on the same pictures for the same minutes.

    python benchmarks/fit_small_images.py fashion-mnist 10m
    python benchmarks/fit_small_images.py cifar10 15m

The baseline is what a user would write: ResNet-18 with a 3x3 stem in float32, SGD with momentum, a one-cycle
schedule that follows the clock over the same time, random shifts and (for CIFAR-10) mirrored pictures, batches of 128.
"""

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import omniconv
from omniconv.core.units import parse_seconds
from omniconv.models.image.resnet import ResNet, ResNetConfig
from omniconv.papers.check import shared_data
from omniconv.papers.small import accuracy, read_cifar10, standardise
from omniconv.pipeline.train import schedule

RESULTS = Path(__file__).parent / "results"


def prepare(name: str, folder: Path) -> Path:
    """Return what `omniconv fit` reads: the IDX folder itself, or the mosaics of CIFAR-10 as one NPZ file."""
    if name == "fashion-mnist":
        return shared_data(name)
    parts = {"train": "train20k.tar", "val": "val2k.tar", "test": "test1k-official-first1000.tar"}
    arrays = {}
    for split, file in parts.items():
        x, y = read_cifar10(file)
        arrays[f"x_{split}"] = x.permute(0, 2, 3, 1).to(torch.uint8).numpy()
        arrays[f"y_{split}"] = y.numpy()
    np.savez(folder / "cifar10.npz", **arrays)
    return folder / "cifar10.npz"


def plain_loop(name: str, data: Path, seconds: float, seed: int = 0) -> dict:
    """Train a plain ResNet-18 for `seconds`; returns its test accuracy."""
    pictures = omniconv.data.sources.open_images(data)
    index = {
        split: [i for i, sample in enumerate(pictures.samples) if sample.split == split]
        for split in ("train", "val", "test")
    }

    def part(*splits: str):
        chosen = [i for split in splits for i in index[split]]
        x = torch.stack([pictures.read(i) for i in chosen]).float()
        return x, torch.tensor([pictures.samples[i].target for i in chosen])

    train, test = part("train"), part("test")
    x, y = standardise(train[0], train[0]), train[1]
    test = standardise(test[0], train[0]), test[1]

    torch.manual_seed(seed)
    config = ResNetConfig((2, 2, 2, 2), bottleneck=False, stem="3x3")
    model = ResNet(config, 10, x.shape[1])
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    flip = name == "cifar10"

    def step() -> None:
        chosen = torch.randint(len(y), (128,))
        padded = F.pad(x[chosen], (4, 4, 4, 4))
        corners = torch.randint(9, (128, 2)).tolist()
        crops = zip(padded, corners, strict=True)
        batch = torch.stack([p[:, i : i + x.shape[2], j : j + x.shape[3]] for p, (i, j) in crops])
        if flip:
            batch = torch.where(torch.rand(128, 1, 1, 1) < 0.5, batch.flip(3), batch)
        loss = nn.functional.cross_entropy(model(batch), y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    began, done, spent = time.perf_counter(), 0, 0.0
    while spent < seconds:
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * schedule(round(1000 * spent / seconds), 1000, 0.2)
        step()
        done, spent = done + 1, time.perf_counter() - began
    return {
        "network": "resnet18 (3x3 stem), float32",
        "accuracy": accuracy(model, test),
        "seconds": round(spent, 1),
        "steps": done,
        "epochs": round(128 * done / len(y), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", choices=["fashion-mnist", "cifar10"])
    parser.add_argument("time", help="training time of each, such as 10m")
    parser.add_argument("--out", type=Path, help="run folder of omniconv fit")
    arguments = parser.parse_args()
    seconds = parse_seconds(arguments.time)
    with tempfile.TemporaryDirectory() as scratch:
        data = prepare(arguments.data, Path(scratch))
        out = arguments.out or Path(scratch) / "run"
        run = omniconv.fit(data, time=seconds, out=out, on_event=show)
        history = run.summary["history"]
        ours = {
            "network": f"{run.plan.network}, {run.plan.precision}",
            "accuracy": 100 * run.summary["metrics"]["accuracy"]["value"],
            "interval": [100 * run.summary["metrics"]["accuracy"][k] for k in ("low", "high")],
            "seconds": history[-1]["seconds"],
            "epochs": history[-1]["epoch"],
            "parameters": run.summary["cost"]["parameters"],
        }
        print(json.dumps(ours), flush=True)
        plain = plain_loop(arguments.data, data, seconds)
    result = {
        "subject": f"fit {arguments.data}",
        "budget_seconds": seconds,
        "omniconv": ours,
        "plain": plain,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"fit_{arguments.data.replace('-', '_')}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def show(event: dict) -> None:
    if event["event"] == "plan":
        print(json.dumps(event["plan"]), flush=True)
    if event["event"] == "epoch":
        print(
            f"epoch {event['epoch']}/{event['epochs']} {event['val_metric']:.4f} {event['seconds']:.0f} s",
            flush=True,
        )
    if event["event"] in ("note", "warning"):
        print(event["message"], flush=True)


if __name__ == "__main__":
    main()
