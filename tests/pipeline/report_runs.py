"""Made-up runs of every task for the tests of the report, and a reader of its page."""

import copy
import math
import re
from functools import cache
from html.parser import HTMLParser

import numpy as np
import torch
from torch import nn

from omniconv.inspect.filters import first_layer_filters
from omniconv.inspect.picture import overlay_png, to_png

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Reads a page as strictly as a browser does not: every tag is closed by its own end."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.ids, self.links, self.images, self.tags = [], [], [], [], set()
        self.sections, self.words, self.headings, self.rows = [], [], [], {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        assert len(values) == len(attributes), f"{tag} has an attribute twice"
        self.tags.add(tag)
        assert not any(name.startswith("on") for name in values)
        if "id" in values:
            assert values["id"] not in self.ids
            self.ids.append(values["id"])
        if tag == "section":
            self.sections.append(values["id"])
        if tag == "img":
            assert values["alt"]
            self.images.append(values["src"])
        if tag == "image":
            self.images.append(values["href"])
        if tag == "svg":
            assert values.get("aria-label") or values.get("aria-hidden")
        if tag == "th":
            assert values["scope"] in ("row", "col")
        if tag == "tr" and self.sections:
            self.rows[self.sections[-1]] = self.rows.get(self.sections[-1], 0) + 1
        self.links += [values[name] for name in ("src", "href", "action", "data", "srcset") if name in values]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", "".join(self.words))


def interval(value, low, high):
    return {"value": value, "low": low, "high": high}


@cache
def digit_images():
    from sklearn.datasets import load_digits

    return load_digits().images


@cache
def picture(seed, side=8, channels=1, photo=False):
    random = np.random.default_rng(seed)
    if channels == 1 and not photo:
        image = torch.tensor(digit_images()[seed % 1797] * 15.9).to(torch.uint8)[None]
    else:
        rough = torch.tensor(random.uniform(0, 255, (1, 3, 7, 9)), dtype=torch.float32)
        image = nn.functional.interpolate(rough, size=(side, side * 4 // 3), mode="bicubic")[0].clamp(0, 255)
        image = (image + torch.tensor(random.normal(0, 6, image.shape))).clamp(0, 255).to(torch.uint8)
    h, w = image.shape[1:]
    cy, cx = random.uniform(0.3, 0.7, 2)
    y, x = np.mgrid[:h, :w]
    heat = np.exp(-(((y / h - cy) / 0.25) ** 2) - ((x / w - cx) / 0.2) ** 2)
    return to_png(image, 0, 255), overlay_png(image, heat, 0, 255)


def item(seed, target, said, confidence, name=None, **how):
    image, cam = picture(seed, **how)
    return {
        "id": name or f"test/{seed}",
        "image": image,
        "cam": cam,
        "target": target,
        "prediction": said,
        "confidence": confidence,
    }


def curve(epochs, start, end, noise=0.0, seed=0):
    random = np.random.default_rng(seed)
    return [
        float(end + (start - end) * math.exp(-4 * e / epochs) * (1 + noise * random.normal()))
        for e in range(epochs)
    ]


def history(epochs, start=2.3, end=0.52, metric=(0.35, 0.981)):
    train, val = curve(epochs, start, end, 0.05), curve(epochs, start * 0.96, end * 0.95, 0.15, 1)
    score = curve(epochs, *metric, 0.1, 2)
    return [
        {
            "epoch": e + 1,
            "step": 40 * (e + 1),
            "lr": 0.05 * min(1, (e + 1) / 6) * (0.5 + 0.5 * math.cos(math.pi * e / epochs)),
            "train_loss": train[e],
            "val_loss": val[e],
            "val_metric": min(score[e], 0.989) if metric[1] < 1 else score[e],
            "seconds": 1.4 * (e + 1),
            "images_per_second": 5200 + 90 * (e % 5),
        }
        for e in range(epochs)
    ]


def digits():
    """A run on ten classes, as `omniconv fit digits` leaves it."""
    classes = [str(d) for d in range(10)]
    confusion = np.diag([27, 27, 26, 26, 27, 27, 27, 26, 24, 26]).tolist()
    for true, said, count in ((8, 1, 2), (3, 5, 1), (9, 7, 1), (2, 3, 1), (5, 9, 1), (4, 7, 1)):
        confusion[true][said] += count
    matrix = np.array(confusion)
    hit, n = np.diag(matrix), matrix.sum()
    precision, recall = hit / matrix.sum(0), hit / matrix.sum(1)
    right = float(hit.sum() / n)
    summary = {
        "omniconv": "0.1.0",
        "name": "001",
        "path": "runs/001",
        "created": "2026-11-21 09:14",
        "command": "omniconv fit digits",
        "seconds": {
            "audit": 1.9,
            "plan": 6.4,
            "train": 57.8,
            "evaluate": 1.2,
            "explain": 0.9,
            "export": 9.7,
            "bench": 3.1,
        },
        "task": "classification",
        "data": {
            "source": "digits",
            "samples": 1797,
            "classes": classes,
            "channels": 1,
            "height": 8,
            "width": 8,
            "counts": {
                "train": {c: 120 + (7 * int(c)) % 9 for c in classes},
                "val": {c: 26 + int(c) % 3 for c in classes},
                "test": {c: int(matrix[int(c)].sum()) for c in classes},
            },
            "problems": [
                {
                    "kind": "near-duplicate",
                    "message": "14 near-duplicates span train and val; kept in train only",
                    "severity": "warning",
                    "count": 14,
                },
                {
                    "kind": "mixed-sizes",
                    "message": "All pictures are 8 × 8 pixels, which is very small; nothing finer can be learned.",
                    "severity": "info",
                    "count": 0,
                },
            ],
            "fingerprint": "4a1f09c2d77be310",
        },
        "plan": {
            "network": "resnet20_cifar",
            "options": {},
            "size": 32,
            "batch": 32,
            "accumulate": 1,
            "epochs": 40,
            "precision": "float32",
            "channels_last": True,
            "optimizer": "sgd",
            "lr": 0.05,
            "weight_decay": 0.0005,
            "warmup": 0.2,
            "ema": 0.9871,
            "smoothing": 0.1,
            "clip": 5.0,
            "patience": 13,
            "seconds": None,
            "augment": {
                "flip_horizontal": False,
                "flip_vertical": False,
                "crop": "pad",
                "crop_padding": 0.125,
                "crop_scale": 0.35,
                "rotate": 10.0,
                "color": 0.0,
                "auto": "none",
                "mixup": 0.0,
                "cutmix": 0.0,
                "erase": 0.1,
            },
            "reasons": [
                "resnet20_cifar: 5212 pictures/s in training here",
                "40 epochs of about 1.4 s",
                "a linear model gets 92% of held-out pictures right, 31% mirrored left to right: none are mirrored",
            ],
        },
        "history": history(40),
        "main_metric": "accuracy",
        "metrics": {
            "accuracy": interval(right, 0.9485, 0.9874),
            "balanced_accuracy": interval(float(recall.mean()), 0.951, 0.988),
            "macro_f1": interval(float((2 * precision * recall / (precision + recall)).mean()), 0.95, 0.987),
            "nll": interval(0.0871, 0.0612, 0.1204),
            "top5_accuracy": interval(1.0, 0.986, 1.0),
        },
        "baselines": {
            "majority": {
                "accuracy": interval(0.1037, 0.0727, 0.1458),
                "balanced_accuracy": interval(0.1, 0.1, 0.1),
                "nll": interval(2.303, 2.30, 2.306),
            },
            "linear": {
                "accuracy": interval(0.9222, 0.884, 0.949),
                "balanced_accuracy": interval(0.921, 0.887, 0.95),
                "macro_f1": interval(0.92, 0.885, 0.949),
                "nll": interval(0.31, 0.25, 0.38),
            },
        },
        "per_class": [
            {
                "name": c,
                "precision": float(precision[i]),
                "recall": float(recall[i]),
                "f1": float(2 * precision[i] * recall[i] / (precision[i] + recall[i])),
                "support": int(matrix[i].sum()),
            }
            for i, c in enumerate(classes)
        ],
        "confusion": confusion,
        "calibration": {
            "ece": 0.0183,
            "bins": [
                {"confidence": c, "accuracy": a, "count": n}
                for c, a, n in (
                    (0.46, 0.5, 2),
                    (0.55, 0.4, 5),
                    (0.66, 0.72, 7),
                    (0.75, 0.83, 12),
                    (0.86, 0.9, 31),
                    (0.97, 0.995, 213),
                )
            ],
        },
        "cost": {
            "parameters": 269_434,
            "macs": 40_812_288,
            "file_bytes": 1_097_816,
            "latency_ms": {
                "eager": {"median": 2.91, "batch": 1},
                "torch.export": {"median": 2.2, "batch": 1},
                "onnxruntime": {"median": 0.83, "batch": 1},
                "int8": {"median": 0.39, "batch": 1},
            },
        },
        "int8": {
            "bytes_before": 1_100_000,
            "bytes_after": 330_000,
            "speedup": 2.13,
            "score_before": 0.974,
            "score_after": 0.97,
            "measure": "accuracy",
        },
        "export": {
            "files": [
                {
                    "path": "export/model.pt2",
                    "format": "torch",
                    "bytes": 1_320_112,
                    "max_difference": 1.8e-7,
                    "verified": True,
                },
                {
                    "path": "export/model.onnx",
                    "format": "onnx",
                    "bytes": 1_101_202,
                    "max_difference": 4.2e-7,
                    "verified": True,
                },
            ]
        },
        "notes": ["out of memory at batch 64; continuing at 32 with accumulation 2"],
    }
    torch.manual_seed(0)
    pictures = {
        "best": [item(10 * d + d, str(d), str(d), 0.999 - d / 900) for d in range(8)],
        "worst": [
            item(300 + k, *pair, 0.93 - k / 20)
            for k, pair in enumerate((("8", "1"), ("3", "5"), ("9", "7"), ("2", "3"), ("5", "9")))
        ],
        "confused": [
            item(400 + k, *pair, 0.7) for k, pair in enumerate((("8", "1"), ("3", "5"), ("9", "7")))
        ],
        "samples": [item(40 + k, str(k), None, None) for k in range(10)],
        "filters": first_layer_filters(nn.Conv2d(1, 16, 3)).png(),
    }
    return summary, pictures


def species(count=200, photos=True):
    """Many classes, photographs, a network that is often wrong."""
    summary, pictures = copy.deepcopy(digits())
    random = np.random.default_rng(0)
    adjectives, animals = (
        "red grey lesser greater spotted northern pygmy marsh".split(),
        "heron finch warbler otter newt skipper vole owl".split(),
    )
    classes = [f"{adjectives[i % 8]} {animals[i // 8 % 8]} {i // 64 or ''}".strip() for i in range(count)]
    matrix = np.zeros((count, count), int)
    for true in range(count):
        for _ in range(30 - true % 17):
            said = true if random.random() < 0.72 else (true + int(random.geometric(0.2))) % count
            matrix[true, said] += 1
    hit = np.diag(matrix)
    precision, recall = hit / np.maximum(matrix.sum(0), 1), hit / matrix.sum(1)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-9)
    summary["data"] |= {
        "source": "/data/wild animals/photos",
        "classes": classes,
        "samples": 24000,
        "channels": 3,
        "height": 480,
        "width": 640,
        "counts": {
            split: {c: int(share * (30 - i % 17)) for i, c in enumerate(classes)}
            for split, share in (("train", 5), ("val", 1), ("test", 1))
        },
        "problems": [
            {
                "kind": "unreadable",
                "message": "37 of 24000 pictures are unreadable; they are left out: runs/wild/bad.csv",
                "severity": "error",
                "count": 37,
            },
            {
                "kind": "imbalance",
                "message": "red heron has 150 pictures and marsh owl 3 only 65.",
                "severity": "warning",
                "count": 200,
            },
        ],
    }
    accuracy = float(hit.sum() / matrix.sum())
    summary |= {
        "path": "runs/wild animals",
        "name": "wild animals",
        "confusion": matrix.tolist(),
        "notes": [],
        "history": history(24, 5.3, 1.9, (0.02, accuracy)),
        "per_class": [
            {
                "name": c,
                "precision": float(precision[i]),
                "recall": float(recall[i]),
                "f1": float(f1[i]),
                "support": int(matrix[i].sum()),
            }
            for i, c in enumerate(classes)
        ],
    }
    summary["metrics"] |= {"accuracy": interval(accuracy, accuracy - 0.014, accuracy + 0.013)}
    if not photos:
        return summary, {}
    photo = {"side": 160, "channels": 3}
    pictures = {
        "best": [
            item(k, classes[k], classes[k], 0.99, f"photos/{classes[k]}/IMG_{k:05d}.jpg", **photo)
            for k in range(8)
        ],
        "worst": [
            item(
                k, classes[k], classes[(k + 1) % count], 0.9, f"photos/{classes[k]}/IMG_{k:05d}.jpg", **photo
            )
            for k in range(8, 16)
        ],
        "confused": [
            item(
                k, classes[k], classes[(k + 1) % count], 0.6, f"photos/{classes[k]}/IMG_{k:05d}.jpg", **photo
            )
            for k in range(16, 24)
        ],
        "samples": [item(k, classes[k], None, None, **photo) for k in range(12)],
        "filters": first_layer_filters(nn.Conv2d(3, 64, 7)).png(),
    }
    return summary, pictures


def birds40():
    return species(40)


def regression():
    """A number for every picture."""
    summary, _ = digits()
    random = np.random.default_rng(0)
    truth = random.gamma(4, 12, 300)
    said = truth * 0.93 + 3 + random.normal(0, 5, 300)
    for key in ("confusion", "per_class", "calibration", "notes", "int8"):
        del summary[key]
    summary |= {
        "task": "regression",
        "main_metric": "mae",
        "history": history(30, 1.2, 0.1, (38.0, 4.2)),
        "path": "runs/age",
        "metrics": {
            "mae": interval(4.13, 3.8, 4.5),
            "rmse": interval(5.3, 4.9, 5.8),
            "r2": interval(0.951, 0.94, 0.96),
        },
        "baselines": {
            "majority": {
                "mae": interval(18.4, 17.0, 20.1),
                "rmse": interval(24.1, 22, 26),
                "r2": interval(-0.002, -0.02, 0.0),
            },
            "linear": {
                "mae": interval(4.6, 4.1, 5.1),
                "rmse": interval(5.9, 5.4, 6.4),
                "r2": interval(0.93, 0.91, 0.95),
            },
        },
        "regression": {"name": "age", "scatter": np.stack([truth, said], 1).tolist()},
    }
    summary["data"] |= {
        "classes": ["age"],
        "counts": {"train": {"all": 1400}, "val": {"all": 300}, "test": {"all": 300}},
        "source": "faces/",
        "problems": [],
    }
    pictures = {
        "best": [item(k, f"{20 + k}.0", f"{20 + k}.1", None) for k in range(4)],
        "worst": [item(k, 61.5, 88.25, None) for k in range(4, 8)],
        "filters": None,
    }
    return summary, pictures


def multilabel():
    """Any number of labels a picture."""
    summary, _ = digits()
    labels = ["cloud", "water", "road", "forest"]
    for key in ("confusion", "notes", "int8"):
        del summary[key]
    summary |= {
        "task": "multilabel",
        "main_metric": "mean_average_precision",
        "metrics": {
            "mean_average_precision": interval(0.884, 0.86, 0.905),
            "macro_f1": interval(0.81, 0.78, 0.84),
            "exact_match": interval(0.62, 0.57, 0.67),
        },
        "baselines": {
            "majority": {"mean_average_precision": interval(0.3, 0.27, 0.33)},
            "linear": {"mean_average_precision": interval(0.88, 0.85, 0.9)},
        },
        "per_class": [
            {"name": n, "precision": 0.8, "recall": 0.7 + i / 20, "f1": 0.75 + i / 40, "support": 90 - i}
            for i, n in enumerate(labels)
        ],
    }
    summary["data"] |= {
        "classes": labels,
        "counts": {s: {n: 100 + i for i, n in enumerate(labels)} for s in ("train", "val", "test")},
    }
    pictures = {
        "best": [item(k, "cloud|road", "cloud, road", None) for k in range(4)],
        "worst": [item(5, [1, 0, 0, 1], [0, 0, 0, 0], None)],
    }
    return summary, pictures
