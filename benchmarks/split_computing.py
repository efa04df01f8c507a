"""Bytes on the wire and accuracy on real pictures: JPEG files for the whole network against split networks.

    python benchmarks/split_computing.py

Pictures are those of Fashion-MNIST enlarged to 48 pixels, the network a small ResNet trained on 12,000 of them and
split behind its first stage. JPEG is Pillow's at several qualities, of the enlarged pictures and of the small ones (the
server then enlarges them), with Huffman tables optimised for each file. What a split sends is counted on a loopback
socket, lengths and headers included.
"""

import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from omniconv import create_model
from omniconv.deploy.split.distill import distill_head, distill_tail
from omniconv.deploy.split.entropic_student import EntropicBottleneck
from omniconv.deploy.split.network import split
from omniconv.deploy.split.wire import SplitDevice, SplitServer
from omniconv.papers.checks import entropic_student as common
from omniconv.papers.small import Split, accuracy, fashion_mnist, train

RESULTS = Path(__file__).parent / "results" / "split_computing.json"
PRICES = (0.02, 0.1, 0.4)
IMAGES, TEST, EPOCHS = 12000, 2000, (3, 1)


def jpeg_rows(model: nn.Module, pixels: Tensor, labels: Tensor) -> Iterator[dict[str, Any]]:
    for pictures in (common.enlarge(pixels), pixels):
        for quality in common.QUALITIES:
            decoded, count = common.jpeg(pictures, quality)
            yield {
                "form": f"JPEG {pictures.shape[-1]} px, quality {quality}",
                "bytes": count,
                "accuracy": accuracy(model, (common.standard(common.enlarge(decoded)), labels)),
            }


def split_row(price: float, model: nn.Module, images: Split, test: Split) -> dict[str, Any]:
    torch.manual_seed(0)
    student = split(model, common.LAYERS[0], EntropicBottleneck(common.CHANNELS), images[0][:1])
    student = student.to(memory_format=torch.channels_last)
    batches = common.batches(images, 0)
    heads = [x for x, _ in batches]
    distill_head(student, model, heads, layers=common.LAYERS, beta=price, epochs=EPOCHS[0], lr=common.RATE)
    distill_tail(student, model, batches, epochs=EPOCHS[1], lr=common.RATE / 3)
    with SplitServer(student) as server, SplitDevice(student, server.address) as device:
        answers = device(test[0])
        received = server.received_bytes
    right = sum(
        answer is not None and int(answer.argmax()) == label
        for answer, label in zip(answers, test[1].tolist(), strict=True)
    )
    report = student.report(test[0][:1])
    return {
        "form": f"split, price {price:g}",
        "bytes": received / len(answers),
        "accuracy": 100 * right / len(answers),
        "device_macs": report.device_macs,
        "device_parameters": report.device_parameters,
    }


def main() -> None:
    (x, y), (tx, ty) = fashion_mnist(IMAGES, TEST)
    pixels, unseen = common.to_pixels(x), common.to_pixels(tx)
    images, test = (common.standard(common.enlarge(p)) for p in (pixels, unseen))
    torch.manual_seed(0)
    model = create_model("resnet18", num_classes=10, in_chans=1, depths=(1, 1, 1), widths=(16, 32, 64))
    model = model.to(memory_format=torch.channels_last)
    train(model, (images, y), epochs=3, batch=32, shift=1)
    model.eval()

    whole = {"form": "all pixels", "bytes": test[0].numel(), "accuracy": accuracy(model, (test, ty))}
    files = list(jpeg_rows(model, unseen, ty))
    splits = [split_row(price, model, (images, y), (test, ty)) for price in PRICES]
    print(f"{'form':26s} {'bytes':>7s} {'accuracy':>9s}  of JPEG's bytes at that accuracy")
    for row in (whole, *files, *splits):
        equal = [file["bytes"] for file in files if file["accuracy"] >= row["accuracy"]]
        if equal and "device_macs" in row:
            row["of_jpeg"] = row["bytes"] / min(equal)
        ratio = f"  {row['of_jpeg']:.2f}" if "of_jpeg" in row else ""
        print(f"{row['form']:26s} {row['bytes']:7.0f} {row['accuracy']:8.1f}%{ratio}")
    result = {
        "subject": "bytes on the wire and accuracy, Fashion-MNIST at 48 pixels",
        "rows": [whole, *files, *splits],
        "images": IMAGES,
        "epochs": EPOCHS,
        "machine": platform.machine(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
