"""One picture and 32 pictures through eager PyTorch, torch.export, ONNX Runtime in float and int8, and OpenVINO.

    python benchmarks/deployed_forms.py

The networks have random weights, since time does not depend on them; the accuracy of int8 is shown on trained
weights by tests/deploy/test_resnet20_cifar.py. All forms take raw pixels and run in one process in turn.
"""

import json
import platform
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from omniconv import create_model
from omniconv.core.errors import OmniconvError
from omniconv.data.preprocess import Preprocess
from omniconv.deploy.export import Deployable, export_model
from omniconv.deploy.int8 import quantize_int8
from omniconv.deploy.latency import eager_candidate, exported_candidate, measure

RESULTS = Path(__file__).parent / "results" / "deployed_forms.json"
NETWORKS = {
    "resnet20_cifar": 32,
    "resnet18": 224,
    "resnet50": 224,
    "mobilenetv2_100": 224,
    "efficientnet_b0": 224,
    "repvgg_a0": 224,
    "convnext_tiny": 224,
}
ROUNDS = {1: 30, 32: 5}


def time_forms(name: str, size: int, folder: Path) -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    model = create_model(name).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            # Branches that start at zero would be folded away.
            nn.init.uniform_(module.weight, 0.5, 1.0)
    preprocess = Preprocess(size, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    pictures = [torch.randint(0, 256, (3, size, size), dtype=torch.uint8) for _ in range(8)]
    export_model(model, preprocess, pictures, folder, formats=("torch", "onnx", "openvino"), tolerance=1e-3)
    forms = {"torch.export": "model.pt2", "onnxruntime": "model.onnx", "openvino": "model.xml"}
    try:
        calibration = [picture.numpy() for picture in pictures]
        quantize_int8(folder / "model.onnx", calibration, folder / "int8.onnx", max_drop=1.0, rounds=5)
        forms["onnxruntime int8"] = "int8.onnx"
    except OmniconvError as error:
        print(f"{name}: {error}")
    rows = {}
    for batch, rounds in ROUNDS.items():
        images = torch.stack([pictures[index % 8] for index in range(batch)])
        calls = {"eager": eager_candidate(Deployable(preprocess, model, "probabilities"), images, rounds=2)}
        calls |= {form: exported_candidate(folder / file, images.numpy()) for form, file in forms.items()}
        times = measure(calls, rounds=rounds, warmup=2)
        rows[str(batch)] = {form: round(latency.median, 3) for form, latency in times.items()}
    return rows


def main() -> None:
    found = {}
    for name, size in NETWORKS.items():
        with tempfile.TemporaryDirectory() as folder:
            found[name] = time_forms(name, size, Path(folder))
        for batch, row in found[name].items():
            fastest_float = row["onnxruntime"]
            print(f"{name}, {batch} x {size} x {size}")
            for form, milliseconds in row.items():
                print(
                    f"  {form:18s} {milliseconds:9.2f} ms  {fastest_float / milliseconds:5.2f} x ONNX Runtime float"
                )
    result = {
        "subject": "milliseconds a call, median",
        "networks": found,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
