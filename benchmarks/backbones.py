"""Every family of image networks at about the same cost: training and inference through `omniconv.accelerate`.

    python benchmarks/backbones.py [--only TEXT] [--macs 4e9]

Of each family the variant whose multiply-adds at its own resolution are nearest to `--macs` runs, all on the same
images of 224 pixels (256 for HaloNet, 32 for families that have nothing else). Where timm has a network of the same
name, its own runs beside it in PyTorch, in channels-last (in the default format where torch crashes in it), with the
same weights and the same images; one process, in turn, several copies of both, and the median of the ratios of
neighbouring runs.
"""

import argparse
import copy
import json
import math
import multiprocessing
import platform
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

import omniconv
from omniconv.deploy.accelerate import bears_channels_last
from omniconv.design.cost import count_cost
from omniconv.models.factory import get_variant, list_models

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.accelerate import infer, rounds, step
from tests.parity import import_timm

RESULTS = Path(__file__).parent / "results"
BATCH = 4
# timm's halo attention takes only maps that its blocks divide.
SIZE, OTHER_SIZES = 224, {"HaloNet": 256}
# Where in memory a network lies changes its time by some percent, so several copies of both sides run.
COPIES = 2


def representatives(macs: float) -> dict[str, str]:
    """Return one network a family: the one whose multiply-adds are nearest to `macs`, as a ratio.

    They are those that were published; a family without any is counted.
    """
    families: dict[str, list[tuple[float, str]]] = {}
    counted: dict[str, list[str]] = {}
    for name in list_models():
        variant = get_variant(name)
        family = variant.model.__name__
        if variant.macs and variant.size >= 128:
            families.setdefault(family, []).append((abs(math.log(variant.macs / macs)), name))
        elif not name.endswith("_test"):
            counted.setdefault(family, []).append(name)
    for family in counted.keys() - families.keys():
        least = min(128, max(get_variant(name).size for name in counted[family]))
        for name in counted[family]:
            if (size := get_variant(name).size) >= least:
                cost = count_cost(omniconv.create_model(name, device="meta"), (3, size, size))
                families.setdefault(family, []).append((abs(math.log(cost.macs / macs)), name))
    return {family: min(rows)[1] for family, rows in sorted(families.items())}


def measure(name: str, size: int, seconds: float) -> dict:
    """Time a network here, accelerated, against timm's (or, without one, against itself in plain PyTorch)."""
    timm = import_timm()
    torch.manual_seed(0)
    # timm's networks drop no paths unless told to.
    config = get_variant(name).config
    ours = omniconv.create_model(
        name, **({"drop_path_rate": 0.0} if hasattr(config, "drop_path_rate") else {})
    )
    known = timm is not None and name in timm.list_models()
    plain = timm.create_model(name) if known else copy.deepcopy(ours)
    if known:
        plain.load_state_dict(ours.state_dict())
    form = torch.channels_last if bears_channels_last(plain) else torch.contiguous_format
    plain = plain.to(memory_format=form)
    x = torch.randn(BATCH, 3, size, size).contiguous(memory_format=form)
    row = {
        "network": name,
        "against": "timm" if known else "itself in plain PyTorch",
        "parameters": sum(p.numel() for p in ours.parameters()),
    }
    makers = {
        "plain": lambda training: copy.deepcopy(plain).train(training),
        "accelerated": lambda training: omniconv.accelerate(copy.deepcopy(ours).train(training)),
    }
    for what, run in (("training", step), ("inference", infer)):
        times: dict[str, list[float]] = {side: [] for side in makers}
        for turn in range(COPIES):
            order = list(makers) if turn % 2 else list(makers)[::-1]
            models = {side: makers[side](what == "training") for side in order}
            calls = {
                side: lambda run=run, model=model: run(model, x, torch.float32)
                for side, model in models.items()
            }
            for side, values in rounds(calls, seconds / COPIES, least=4).items():
                times[side] += values
        pairs = zip(times["plain"], times["accelerated"], strict=True)
        row[what] = round(statistics.median(p / a for p, a in pairs), 3)
        row[f"{what} a second"] = round(BATCH / statistics.median(times["accelerated"]), 2)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="networks with this in their name")
    parser.add_argument("--macs", default=4e9, type=float, help="multiply-adds wanted")
    parser.add_argument("--seconds", default=8.0, type=float, help="for every comparison")
    arguments = parser.parse_args()
    rows = []
    for family, name in representatives(arguments.macs).items():
        if arguments.only.lower() not in name.lower():
            continue
        size = OTHER_SIZES.get(family, min(SIZE, max(32, get_variant(name).size)))
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
            f"{family:22s} {name:32s} {row['parameters'] / 1e6:6.1f} M  training {row['training a second']:6.1f}/s "
            f"({row['training']:.2f} x)  inference {row['inference a second']:6.1f}/s ({row['inference']:.2f} x)  "
            f"against {row['against']}",
            flush=True,
        )
    # Only whole: rows that were measured again alone would be those that looked bad.
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
