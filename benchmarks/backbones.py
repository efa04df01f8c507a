"""Every family of image networks at about the same cost: training and inference through `omniconv.accelerate`.

    python benchmarks/backbones.py [--only TEXT] [--macs 4e9]

Of each family the variant whose multiply-adds at its own resolution are nearest to `--macs` runs, all on the same
images of 224 pixels (256 for HaloNet). Where timm has a network of the same name, its own runs beside it in PyTorch, in
channels-last, with the same weights; one process, in turn, medians.
"""

import argparse
import copy
import json
import math
import multiprocessing
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

import omniconv
from omniconv.models.factory import get_variant, list_models

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.accelerate import compare, infer, step
from tests.parity import import_timm

RESULTS = Path(__file__).parent / "results"
BATCH = 4
# timm's halo attention takes only maps that its blocks divide.
SIZE, OTHER_SIZES = 224, {"HaloNet": 256}


def representatives(macs: float) -> dict[str, str]:
    """Return one network a family: the one whose published multiply-adds are nearest to `macs`, as a ratio."""
    nearest: dict[str, tuple[float, str]] = {}
    for name in list_models():
        variant = get_variant(name)
        if variant.macs and variant.size >= 128:
            family = variant.model.__name__
            found = (abs(math.log(variant.macs / macs)), name)
            nearest[family] = min(found, nearest.get(family, found))
    return {family: name for family, (_, name) in sorted(nearest.items())}


def measure(name: str, size: int, seconds: float) -> dict:
    """Time a network here, accelerated, against timm's (or, without one, against itself in plain PyTorch)."""
    timm = import_timm()
    torch.manual_seed(0)
    ours = omniconv.create_model(name)
    known = timm is not None and name in timm.list_models()
    plain = timm.create_model(name) if known else copy.deepcopy(ours)
    if known:
        plain.load_state_dict(ours.state_dict())
    plain = plain.to(memory_format=torch.channels_last)
    x = torch.randn(BATCH, 3, size, size)
    last = x.contiguous(memory_format=torch.channels_last)
    trained = omniconv.accelerate(copy.deepcopy(ours).train())
    deployed = omniconv.accelerate(copy.deepcopy(ours).eval())
    plain.train()
    training = compare(
        {
            "plain": lambda: step(plain, last, torch.float32),
            "accelerated": lambda: step(trained, x, torch.float32),
        },
        seconds,
    )
    plain.eval()
    inference = compare(
        {
            "plain": lambda: infer(plain, last, torch.float32),
            "accelerated": lambda: infer(deployed, x, torch.float32),
        },
        seconds,
    )
    return {
        "network": name,
        "against": "timm" if known else "itself in plain PyTorch",
        "parameters": sum(p.numel() for p in ours.parameters()),
        **{
            f"{what} {side}": round(BATCH / spent[side], 2)
            for what, spent in (("training", training), ("inference", inference))
            for side in spent
        },
        "training": round(training["plain"] / training["accelerated"], 3),
        "inference": round(inference["plain"] / inference["accelerated"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="networks with this in their name")
    parser.add_argument("--macs", default=4e9, type=float, help="multiply-adds wanted")
    parser.add_argument("--seconds", default=4.0, type=float, help="for every comparison")
    arguments = parser.parse_args()
    rows = []
    for family, name in representatives(arguments.macs).items():
        if arguments.only.lower() not in name.lower():
            continue
        size = OTHER_SIZES.get(family, SIZE)
        try:
            # A process for each: torch 2.13 can corrupt its heap in plain channels-last training; see docs/guide/speed.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                figures = process.submit(measure, name, size, arguments.seconds).result()
        except BrokenProcessPool:
            print(f"{family:22s} {name:32s} torch crashed", flush=True)
            rows.append({"family": family, "network": name, "crashed": True})
            continue
        row = {"family": family, "pixels": size, **figures}
        rows.append(row)
        print(
            f"{family:22s} {name:32s} {row['parameters'] / 1e6:6.1f} M  training {row['training accelerated']:6.1f}/s "
            f"({row['training']:.2f} x)  inference {row['inference accelerated']:6.1f}/s ({row['inference']:.2f} x)  "
            f"against {row['against']}",
            flush=True,
        )
    if not arguments.only:
        result = {
            "subject": f"images a second, batches of {BATCH}", "rows": rows,
            "threads": torch.get_num_threads(), "machine": platform.machine(), "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
        }  # fmt: skip
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "backbones.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
