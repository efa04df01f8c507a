"""Blood cells for checks of detection: real pictures, a plain one-stage detector and its average precision."""

import io
import tarfile
import xml.etree.ElementTree as ElementTree
from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.seeds import derive, generator
from omniconv.models.factory import create_model
from omniconv.papers.check import shared_data

__all__ = ["CLASSES", "STRIDE", "CellDetector", "Cells", "ap50", "cells", "train_detector"]

CLASSES = ("RBC", "WBC", "Platelets")
HEIGHT, WIDTH = 96, 128
STRIDE = 8
_SCALE = 5  # the pictures have 640 x 480 pixels

Cells = tuple[Tensor, list[Tensor]]
"""Images (N, 3, 96, 128), standardised, and for each one (M, 5): left, top, right, bottom in pixels, class."""


@cache
def _archive() -> dict[str, bytes]:
    with tarfile.open(shared_data("detection") / "bccd-trainval.tar.gz") as tar:
        files = {m.name.lstrip("./"): tar.extractfile(m) for m in tar.getmembers() if m.isfile()}
        return {name: file.read() for name, file in files.items() if file is not None}


def cells(part: str) -> Cells:
    """Return the 205 pictures of "train" or the 87 of "val"."""
    files = _archive()
    images, boxes = [], []
    for name in files[f"{part}.txt"].decode().split():
        picture = Image.open(io.BytesIO(files[f"JPEGImages/{name}.jpg"]))
        picture.draft("RGB", (2 * WIDTH, 2 * HEIGHT))  # decoded at a smaller size, then averaged
        picture = picture.resize((WIDTH, HEIGHT), Image.Resampling.BOX)
        images.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
        rows = []
        for item in ElementTree.fromstring(files[f"Annotations/{name}.xml"]).iter("object"):
            box = [
                float(item.findtext(f"bndbox/{side}", "0")) / _SCALE
                for side in ("xmin", "ymin", "xmax", "ymax")
            ]
            if box[2] > box[0] and box[3] > box[1]:
                rows.append([*box, float(CLASSES.index(item.findtext("name", "RBC")))])
        boxes.append(torch.tensor(rows).reshape(-1, 5))
    return (torch.stack(images).float() - 180) / 50, boxes


class CellDetector(nn.Module):
    """A residual network of four stages, the last two without strides, and one convolution on the last map.

    Its output (N, 7, H / 8, W / 8) holds logits of the classes and logarithms of the distances from a cell of the map
    to the four sides, in units of the stride.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(derive(seed, "weights"))
        self.backbone = create_model("resnet18", num_classes=0, depths=(1, 1, 1, 1), widths=(16, 24, 32, 48))
        for name in ("layer3", "layer4"):
            for module in self.backbone.get_submodule(name).modules():
                if isinstance(module, nn.Conv2d):
                    module.stride = (1, 1)
        self.head = nn.Conv2d(48, len(CLASSES) + 4, 3, padding=1)
        nn.init.normal_(self.head.weight, std=0.01)
        # Most places hold nothing.
        self.head.bias = nn.Parameter(torch.tensor([-3.0] * len(CLASSES) + [0.0] * 4))

    def forward(self, x: Tensor) -> Tensor:
        """Return the map of logits and distances."""
        return self.head(self.backbone.forward_features(x))


def _places(height: int, width: int) -> tuple[Tensor, Tensor]:
    ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return (xs + 0.5) * STRIDE, (ys + 0.5) * STRIDE


def _targets(boxes: list[Tensor], height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the class (N, H, W), -1 for none, and the distances (N, 4, H, W) of the smallest box at each place.

    A box is learned where a place lies in its inner half, and in the one that holds its centre.
    """
    x, y = _places(height, width)
    kinds = torch.full((len(boxes), height, width), -1)
    sides = torch.ones(len(boxes), 4, height, width)
    for n, found in enumerate(boxes):
        areas = (found[:, 2] - found[:, 0]) * (found[:, 3] - found[:, 1])
        for left, top, right, bottom, kind in found[areas.argsort(descending=True)].tolist():
            cx, cy, w, h = (left + right) / 2, (top + bottom) / 2, right - left, bottom - top
            inside = ((x - cx).abs() <= w / 4) & ((y - cy).abs() <= h / 4)
            inside[min(int(cy / STRIDE), height - 1), min(int(cx / STRIDE), width - 1)] = True
            kinds[n][inside] = int(kind)
            distances = torch.stack([x - left, y - top, right - x, bottom - y]).clamp(min=1) / STRIDE
            sides[n][:, inside] = distances[:, inside]
    return kinds, sides


def _loss(output: Tensor, kinds: Tensor, sides: Tensor) -> Tensor:
    """Return the focal loss of the classes and the distance of the sides' logarithms, a positive place."""
    logits, logs = output[:, : len(CLASSES)], output[:, len(CLASSES) :]
    wanted = torch.stack([(kinds == k).float() for k in range(len(CLASSES))], 1)
    error = (wanted - logits.sigmoid()).abs()
    focal = (error.square() * F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")).sum()
    positive = (kinds >= 0)[:, None].float()
    distance = (F.smooth_l1_loss(logs, sides.log(), reduction="none", beta=0.1) * positive).sum()
    return (focal + distance) / positive.sum().clamp(min=1)


def train_detector(model: CellDetector, data: Cells, *, epochs: int, seed: int = 0, lr: float = 5e-3) -> None:
    """Train in place with AdamW and a one-cycle schedule on pictures and their mirror images, 16 at a time."""
    images, boxes = data
    kinds, sides = _targets(boxes, HEIGHT // STRIDE, WIDTH // STRIDE)
    random = generator(seed, "train")
    steps = -(-len(images) // 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps, pct_start=0.2)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(images), generator=random).split(16):
            x, kind, side = images[chosen], kinds[chosen], sides[chosen]
            if torch.rand((), generator=random) < 0.5:
                x, kind, side = x.flip(3), kind.flip(2), side.flip(3)[:, [2, 1, 0, 3]]
            if torch.rand((), generator=random) < 0.5:
                x, kind, side = x.flip(2), kind.flip(1), side.flip(2)[:, [0, 3, 2, 1]]
            value = _loss(model(x.contiguous(memory_format=torch.channels_last)), kind, side)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
            schedule.step()
    model.eval()


def _overlaps(boxes: Tensor, others: Tensor) -> Tensor:
    """Return the intersections over unions (A, B) of boxes (A, 4) and (B, 4)."""
    low = torch.maximum(boxes[:, None, :2], others[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], others[None, :, 2:])
    common = (high - low).clamp(min=0).prod(2)
    first, second = ((b[:, 2:] - b[:, :2]).prod(1) for b in (boxes, others))
    return common / (first[:, None] + second[None] - common)


def _detections(output: Tensor) -> list[Tensor]:
    """Return (M, 6) an image: box, class and score, the best first, none overlapping a better one of its class."""
    height, width = output.shape[2:]
    x, y = _places(height, width)
    sides = output[:, len(CLASSES) :].clamp(-4, 4).exp() * STRIDE
    boxes = torch.stack([x - sides[:, 0], y - sides[:, 1], x + sides[:, 2], y + sides[:, 3]], -1)
    found = []
    for scores, box in zip(output[:, : len(CLASSES)].sigmoid(), boxes, strict=True):
        rows = []
        for kind in range(len(CLASSES)):
            order = scores[kind].flatten().argsort(descending=True)
            order = order[scores[kind].flatten()[order] > 0.05]
            candidates = box.reshape(-1, 4)[order]
            overlaps = _overlaps(candidates, candidates) > 0.5
            kept: list[int] = []
            for index in range(len(order)):
                if not kept or not bool(overlaps[index, kept].any()):
                    kept.append(index)
            best = scores[kind].flatten()[order][kept]
            rows.append(
                torch.cat([candidates[kept], torch.full((len(kept), 1), float(kind)), best[:, None]], 1)
            )
        found.append(torch.cat(rows))
    return found


@torch.no_grad()
def ap50(model: nn.Module, data: Cells) -> float:
    """Return the average precision at an overlap of one half, mean of the classes, in percent."""
    images, boxes = data
    found = [d for x in images.split(29) for d in _detections(model(x))]
    precisions = []
    for kind in range(len(CLASSES)):
        hits: list[tuple[float, bool]] = []
        count = 0
        for detected, truth in zip(found, boxes, strict=True):
            truth = truth[truth[:, 4] == kind, :4]
            count += len(truth)
            rows = detected[detected[:, 4] == kind]
            free = torch.ones(len(truth), dtype=torch.bool)
            for row, overlap in zip(rows, _overlaps(rows[:, :4], truth), strict=True):
                overlap = torch.where(free, overlap, 0.0)
                hit = len(truth) > 0 and float(overlap.max()) >= 0.5
                if hit:
                    free[overlap.argmax()] = False
                hits.append((float(row[5]), hit))
        right = np.cumsum([hit for _, hit in sorted(hits, key=lambda pair: -pair[0])])
        precision = right / np.arange(1, len(right) + 1)
        # The best precision at this recall or beyond, over the recall that every hit adds.
        envelope = np.maximum.accumulate(precision[::-1])[::-1]
        gained = np.diff(right, prepend=0)
        precisions.append(float((envelope * gained).sum() / max(1, count)))
    return 100 * sum(precisions) / len(precisions)
