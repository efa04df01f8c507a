"""Compare every network that timm has under the same name with timm's, and write docs/parity.json.

    python tools/parity.py [--only PATTERN] [--most 30e6]

Outputs and gradients of the images, eval and training mode, float32 and float64; relative to the largest value.
Networks of more parameters than `--most` are compared in eval mode and float32 alone. What was measured before and
is not matched by `--only` is kept.
"""

import argparse
import fnmatch
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from omniconv.models.factory import create_model, list_models
from tests.parity import (
    calibrate,
    fill,
    gap,
    images_for,
    import_timm,
    input_gradient,
    no_dropout,
    without_init,
)

RESULT = Path(__file__).parents[1] / "docs/parity.json"
COLUMNS = ("eval", "training", "gradients", "eval64", "training64", "gradients64")


def compare(name: str, most: float) -> dict[str, float]:
    """Return the differences of a network from timm's."""
    timm = import_timm()
    assert timm is not None, "timm is not installed"
    images = images_for(name)
    with without_init():
        theirs, ours = timm.create_model(name, num_classes=1000), create_model(name)
    no_dropout(ours)
    no_dropout(theirs)
    fill(theirs)
    calibrate(theirs, images)
    ours.load_state_dict(theirs.state_dict())
    row = {"parameters": float(sum(p.numel() for p in ours.parameters()))}
    if row["parameters"] > most:
        with torch.no_grad():
            return {**row, "eval": gap(ours.eval()(images[:1]), theirs.eval()(images[:1]))}
    for suffix, dtype in (("", torch.float32), ("64", torch.float64)):
        ours, theirs, x = ours.to(dtype), theirs.to(dtype), images.to(dtype)
        # Training mode has moved the running statistics, each by its own rounding.
        ours.load_state_dict(theirs.state_dict())
        with torch.no_grad():
            row[f"eval{suffix}"] = gap(ours.eval()(x[:1]), theirs.eval()(x[:1]))
            row[f"gradients{suffix}"] = gap(input_gradient(ours, x[:1]), input_gradient(theirs, x[:1]))
            row[f"training{suffix}"] = gap(ours.train()(x), theirs.train()(x))
    return row


def main() -> None:
    """Measure, and write after every network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="*", help="shell pattern of names")
    parser.add_argument(
        "--most", default=30e6, type=float, help="parameters up to which everything is compared"
    )
    arguments = parser.parse_args()
    timm = import_timm()
    assert timm is not None, "timm is not installed"
    table = json.loads(RESULT.read_text()) if RESULT.exists() else {"networks": {}}
    networks = {name: row for name, row in table["networks"].items() if name in list_models()}
    for name in sorted(set(list_models()) & set(timm.list_models())):
        if fnmatch.fnmatchcase(name, arguments.only):
            networks[name] = {
                key: float(f"{value:.3g}") for key, value in compare(name, arguments.most).items()
            }
            print(name, networks[name], flush=True)
            table = {
                "timm": timm.__version__,
                "torch": torch.__version__,
                "columns": COLUMNS,
                "networks": networks,
            }
            RESULT.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
