"""Prints one table of everything in benchmarks/results: how many times as fast as what a user would run instead."""

import json
import math
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def ratios(name: str, result: dict[str, Any]) -> dict[str, list[float]]:
    """Return the ratios of a result, above 1 where ours is the faster one, by what was compared."""
    if name.startswith("depthwise_conv"):
        return {"training step": [row["speedup"] for row in result["rows"]]}
    if name.startswith(("accelerate", "backbones")):
        rows = [row for row in result["rows"] if "crashed" not in row]
        return {what: [row[what] for row in rows] for what in ("training", "inference")}
    if name == "deployed_forms":
        rows = [row for batches in result["networks"].values() for row in batches.values()]
        forms = ("openvino", "onnxruntime int8")
        return {
            f"{form} against onnxruntime": [row["onnxruntime"] / row[form] for row in rows if form in row]
            for form in forms
        }
    if name == "long_conv":
        return {what: [row[f"{what}_speedup"] for row in result["rows"]] for what in ("forward", "step")}
    if name == "gpu":
        found: dict[str, list[float]] = {}
        for subject in result["wanted"]:
            for row in result[subject]:
                for what in ("forward", "step"):
                    for side, ratio in row.get(what, {}).items():
                        found.setdefault(f"{subject}: {row['ours']} {what} / {side}", []).append(ratio)
        return found
    return {}


def main() -> None:
    print(f"{'benchmark':26s} {'compared':44s} {'cases':>5s} {'least':>7s} {'mean':>7s} {'most':>7s}")
    for path in sorted(RESULTS.glob("*.json")):
        for what, values in ratios(path.stem, json.loads(path.read_text())).items():
            mean = math.exp(sum(map(math.log, values)) / len(values))
            print(
                f"{path.stem:26s} {what:44s} {len(values):5d} {min(values):7.2f} {mean:7.2f} {max(values):7.2f}"
            )


if __name__ == "__main__":
    main()
