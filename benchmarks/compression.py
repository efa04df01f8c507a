"""The public CIFAR-10 ResNet-20 made smaller by every kind of method, beside torch-pruning and ONNX Runtime.

    python benchmarks/compression.py [--epochs 1] [--part pruning|quantization]

Weights and pictures are those of the shared data. Accuracy is on the first 1,000 official test pictures, of which the
float network gets 915. Pruned networks get the same short fine-tuning, whatever pruned them. Sparse methods
remove weights, structured ones channels until the given share of multiply-adds is gone. Peers run where installed.
"""

import argparse
import copy
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import omniconv
from omniconv.compress.prune.global_magnitude import global_magnitude
from omniconv.compress.prune.knapsack import knapsack_pruning
from omniconv.compress.prune.masks import hold_masks
from omniconv.compress.prune.random_prune import random_prune
from omniconv.compress.prune.rd_prune import rd_prune
from omniconv.compress.prune.structured import structured_pruning
from omniconv.compress.quantize.adaquant import adaquant
from omniconv.compress.quantize.quantize import quantize
from omniconv.compress.quantize.zeroq import zeroq
from omniconv.design.cost import count_cost
from omniconv.papers.check import shared_data
from omniconv.papers.small import Split, accuracy, read_cifar10

RESULTS = Path(__file__).parent / "results"
SHAPE = (3, 32, 32)
SHARES = (0.5, 0.8, 0.9, 0.95)


def normal(split: Split) -> Split:
    """Return pictures as the public network takes them."""
    images, labels = split
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    return (images / 255 - mean) / std, labels


def fine_tune(model: nn.Module, split: Split, epochs: float) -> nn.Module:
    """Train with SGD, a cosine schedule, shifts and flips; zeros of convolutions and linear layers stay zero."""
    images, labels = split
    draw = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4, nesterov=True)
    steps = max(1, round(epochs * len(labels) / 128))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    with hold_masks(model, optimizer):
        for _ in range(steps):
            batch = torch.randint(len(labels), (128,), generator=draw)
            x = images[batch]
            dy, dx = torch.randint(0, 9, (2,), generator=draw).tolist()
            x = F.pad(x, (4, 4, 4, 4))[..., dy : dy + 32, dx : dx + 32]
            x = torch.where(torch.rand(len(x), 1, 1, 1, generator=draw) < 0.5, x.flip(3), x)
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def methods(model: nn.Module, train: Split) -> dict[str, Callable[[float], nn.Module]]:
    """Return every way to prune, as a function of the share that goes."""
    images, labels = (part[:512] for part in train)

    def losses() -> list[Callable[[nn.Module], Tensor]]:
        return [
            lambda net, x=x, y=y: F.cross_entropy(net(x), y)
            for x, y in zip(images.split(64), labels.split(64), strict=True)
        ]

    found: dict[str, Callable[[float], nn.Module]] = {
        "random (ERK)": lambda s: random_prune(model, s)[0],
        "global magnitude": lambda s: global_magnitude(model, s)[0],
        "rate-distortion": lambda s: rd_prune(model, s, images[:256])[0],
        "channels, magnitude": lambda s: structured_pruning(model, SHAPE, s, of="macs", scope="network")[0],
        "channels, knapsack": lambda s: knapsack_pruning(model, SHAPE, losses(), s)[0],
    }
    try:
        import torch_pruning
    except ImportError:
        return found

    def peer(share: float) -> nn.Module:
        """torch-pruning with group norms over all layers, one small step after another until the share is gone."""
        net, x = copy.deepcopy(model), torch.randn(1, *SHAPE)
        wanted = (1 - share) * count_cost(model, SHAPE).macs
        pruner = torch_pruning.pruner.BasePruner(
            net, x, importance=torch_pruning.importance.GroupMagnitudeImportance(), global_pruning=True,
            pruning_ratio=0.98, iterative_steps=200,
            ignored_layers=[m for m in net.modules() if isinstance(m, nn.Linear)],
        )  # fmt: skip
        for _ in range(200):
            if count_cost(net, SHAPE).macs <= wanted:
                break
            pruner.step()
        return net

    return {**found, "channels, torch-pruning": peer}


def pruning(model: nn.Module, train: Split, test: Split, epochs: float) -> Iterator[dict[str, Any]]:
    """Prune by every method to every share, before and after the same fine-tuning."""
    whole = count_cost(model, SHAPE)
    for name, prune in methods(model, train).items():
        for share in SHARES:
            started = time.perf_counter()
            try:
                smaller = prune(share)
            except ValueError as error:
                yield {"method": name, "share": share, "refused": str(error)}
                continue
            spent = time.perf_counter() - started
            cost = count_cost(smaller, SHAPE)
            left = sum(int(p.count_nonzero()) for p in smaller.parameters()) / whole.parameters
            before = accuracy(smaller, test)
            yield {
                "method": name,
                "share": share,
                "weights left": round(left, 4),
                "multiply-adds left": round(cost.macs / whole.macs, 4),
                "before": round(before, 2),
                "after": round(accuracy(fine_tune(smaller, train, epochs), test), 2),
                "seconds": round(spent, 1),
            }


def quantization(model: nn.Module, train: Split, test: Split) -> Iterator[dict[str, Any]]:
    """Quantize with and without data, and with ONNX Runtime's own quantizer on the same pictures."""
    images = train[0][:256]
    ways: dict[str, Callable[[], Any]] = {
        "int8": lambda: quantize(model, images),
        "4-bit weights, 8-bit activations": lambda: quantize(model, images, weights=4),
        "4-bit": lambda: quantize(model, images, weights=4, activations=4),
        "4-bit, AdaQuant light": lambda: adaquant(model, images, steps=0),
        "4-bit, AdaQuant": lambda: adaquant(model, images, steps=100),
        "int8 without data, ZeroQ": lambda: zeroq(model, SHAPE, bits=8.0, choices=(8,)),
        "mixed, 4 bits on average, without data, ZeroQ": lambda: zeroq(model, SHAPE, bits=4.0),
    }
    for name, way in ways.items():
        started = time.perf_counter()
        smaller, report = way()
        yield {
            "method": name,
            "accuracy": round(accuracy(smaller, test), 2),
            "bytes": report.after.bytes,
            "smaller": round(report.before.bytes / report.after.bytes, 2),
            "seconds": round(time.perf_counter() - started, 1),
        }
    yield from onnx_runtime(model, images, test)


def onnx_runtime(model: nn.Module, images: Tensor, test: Split) -> Iterator[dict[str, Any]]:
    """ONNX Runtime's static quantizer: per-channel int8 weights, uint8 activations, ranges of the same pictures."""
    try:
        import onnxruntime
        from onnxruntime import quantization as peer
    except ImportError:
        return

    class Reader(peer.CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(images.split(1))

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"x": batch.numpy()}

    with tempfile.TemporaryDirectory() as folder:
        plain, packed = f"{folder}/model.onnx", f"{folder}/int8.onnx"
        torch.onnx.export(
            model.eval(), (images[:2],), plain, input_names=["x"],
            dynamic_shapes=({0: torch.export.Dim("n")},), dynamo=True, verbose=False,
        )  # fmt: skip
        started = time.perf_counter()
        peer.quantize_static(plain, packed, Reader(), per_channel=True, quant_format=peer.QuantFormat.QDQ)
        spent = time.perf_counter() - started
        session = onnxruntime.InferenceSession(packed, providers=["CPUExecutionProvider"])
        right = 0
        for x, y in zip(test[0].split(100), test[1].split(100), strict=True):
            (logits,) = session.run(None, {"x": x.numpy()})
            right += int((torch.from_numpy(logits).argmax(1) == y).sum())
        size, before = Path(packed).stat().st_size, Path(plain).stat().st_size
        yield {
            "method": "int8, ONNX Runtime's quantizer", "accuracy": 100 * right / len(test[1]), "bytes": size,
            "smaller": round(before / size, 2), "seconds": round(spent, 1),
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", default=1.0, type=float, help="of fine-tuning on 20,000 pictures")
    parser.add_argument("--part", choices=("pruning", "quantization"), help="one of the two only")
    arguments = parser.parse_args()
    train, test = (normal(read_cifar10(f)) for f in ("train20k.tar", "test1k-official-first1000.tar"))
    weights = shared_data("weights") / "resnet20_cifar10.safetensors"
    model = omniconv.create_model("resnet20_cifar", num_classes=10, pretrained=weights).eval()
    whole = accuracy(model, test)
    print(f"resnet20, float: {whole:.1f}%")
    result: dict[str, Any] = {
        "subject": "ResNet-20 on CIFAR-10",
        "accuracy": whole,
        "epochs": arguments.epochs,
    }
    parts = {
        "pruning": lambda: pruning(model, train, test, arguments.epochs),
        "quantization": lambda: quantization(model, train, test),
    }
    for part, rows in parts.items():
        if arguments.part in (None, part):
            result[part] = []
            for row in rows():
                result[part].append(row)
                print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if arguments.part is None:
        result |= {
            "threads": torch.get_num_threads(), "machine": platform.machine(), "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
        }  # fmt: skip
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "compression.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
