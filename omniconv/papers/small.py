"""Small fair trainings for checks: real pictures, one recipe, the same budget for everybody."""

import gzip
import io
import math
import tarfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.seeds import generator
from omniconv.papers.check import shared_data

__all__ = [
    "Split", "accuracy", "cifar10", "digits", "fashion_mnist", "read_cifar10", "standardise", "train",
]  # fmt: skip

Split = tuple[Tensor, Tensor]
"""Images (N, C, H, W), float32, of zero mean and unit variance, and labels (N,), int64."""


def standardise(images: Tensor, reference: Tensor) -> Tensor:
    """Return images with the channel means of `reference` taken off, in units of its deviations."""
    mean = reference.mean((0, 2, 3), keepdim=True)
    return (images - mean) / reference.std((0, 2, 3), keepdim=True)


def digits(size: int = 8) -> tuple[Split, Split]:
    """Return (train, test) of scikit-learn's 1,797 handwritten digits, enlarged to `size` pixels."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    images = torch.from_numpy(bunch.images).float()[:, None]
    labels = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(labels), generator=generator(0, "digits"))
    images, labels = images[order], labels[order]
    images = standardise(images, images[:1300])
    if size != 8:
        images = F.interpolate(images, size=(size, size), mode="bilinear")
    return (images[:1300], labels[:1300]), (images[1300:], labels[1300:])


def fashion_mnist(train: int = 30000, test: int = 10000) -> tuple[Split, Split]:
    """Return the first `train` and `test` images of Fashion-MNIST, (N, 1, 28, 28)."""
    folder = shared_data("fashion-mnist")

    def read(name: str, count: int) -> Split:
        pixels = gzip.decompress((folder / f"{name}-images-idx3-ubyte.gz").read_bytes())
        labels = gzip.decompress((folder / f"{name}-labels-idx1-ubyte.gz").read_bytes())
        images = np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 1, 28, 28)[:count]
        return torch.tensor(images).float(), torch.tensor(
            np.frombuffer(labels, np.uint8, offset=8)[:count]
        ).long()

    (x, y), (tx, ty) = read("train30k", train), read("t10k", test)
    return (standardise(x, x), y), (standardise(tx, x), ty)


def read_cifar10(file: str) -> Split:
    """Return pictures (N, 3, 32, 32), float32 from 0 to 255, and labels of one tar of mosaics."""
    from PIL import Image

    with tarfile.open(shared_data("cifar10") / file) as tar:
        content: dict[str, bytes] = {}
        for member in tar.getmembers():
            if (extracted := tar.extractfile(member)) is not None:
                content[member.name.lstrip("./")] = extracted.read()
    names = sorted(name for name in content if name.endswith(".webp"))
    mosaics = [np.asarray(Image.open(io.BytesIO(content[name])).convert("RGB")) for name in names]
    # Each mosaic is a grid of 25 rows and 40 columns of pictures.
    tiles = [m.reshape(25, 32, 40, 32, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32) for m in mosaics]
    labels = [int(line.split()[0]) for line in content["labels.txt"].decode().splitlines() if line.strip()]
    return torch.tensor(np.concatenate(tiles)[: len(labels)]).float(), torch.tensor(labels)


def cifar10(train: int = 20000, test: int = 2000) -> tuple[Split, Split]:
    """Return the first `train` images of the CIFAR-10 subset and `test` of its validation images."""
    x, y = (part[:train] for part in read_cifar10("train20k.tar"))
    tx, ty = (part[:test] for part in read_cifar10("val2k.tar"))
    return (standardise(x, x), y), (standardise(tx, x), ty)


@torch.no_grad()
def accuracy(model: nn.Module, split: Split, batch: int = 500) -> float:
    """Return the share of correct answers in percent, in eval mode."""
    model.eval()
    images, labels = split
    right = sum(
        int((model(x).argmax(1) == y).sum())
        for x, y in zip(images.split(batch), labels.split(batch), strict=True)
    )
    return 100 * right / len(labels)


def train(
    model: nn.Module,
    split: Split,
    *,
    epochs: float,
    batch: int = 128,
    lr: float = 2e-3,
    weight_decay: float = 0.05,
    seed: int = 0,
    shift: int = 2,
    flip: bool = True,
    after_step: Callable[[int, int], None] | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> float:
    """Train in place with AdamW, a one-cycle schedule and shifted, flipped images; return the last mean loss.

    Args:
        model: gives logits.
        split: the training images.
        epochs: may be a fraction.
        batch: images a step.
        lr: peak of the schedule, which rises over the first fifth and falls to zero as a cosine.
        weight_decay: of AdamW.
        seed: of order and augmentation. Seed the model's own weights before you make it.
        shift: largest shift in pixels; 0 for none.
        flip: mirror half of the images.
        after_step: called with (step, steps) after each update, for example to hold a pruning mask.
        loss: of logits and labels.
    """
    images, labels = split
    steps = math.ceil(epochs * len(labels) / batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.2)
    random = generator(seed, "train")
    order = torch.empty(0, dtype=torch.long)
    model.train()
    losses: list[float] = []
    for step in range(steps):
        if len(order) < batch:
            order = torch.cat([order, torch.randperm(len(labels), generator=random)])
        chosen, order = order[:batch], order[batch:]
        x = images[chosen]
        if shift:
            dy, dx = torch.randint(-shift, shift + 1, (2,), generator=random).tolist()
            x = F.pad(x, (shift,) * 4)[
                ..., shift + dy : shift + dy + images.shape[2], shift + dx : shift + dx + images.shape[3]
            ]
        if flip:
            mirrored = torch.rand(len(x), 1, 1, 1, generator=random) < 0.5
            x = torch.where(mirrored, x.flip(3), x)
        value = loss(model(x), labels[chosen])
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        schedule.step()
        losses.append(value.item())
        if after_step is not None:
            after_step(step, steps)
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / len(tail)
