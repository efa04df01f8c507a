"""Gates of channels and pixels cost C^2 and C weights, 1 to 2% of a U-Net, and a U-Net with them segments better.

Counts are those of the paper's section 3. The data are the slices of the ISBI 2012 membranes, averaged to 128 x 128
pixels; both networks see the same 1,000 crops in the same order.
"""

import io
import math
import tarfile

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.seeds import derive, generator
from omniconv.layers.attention.scse import CSE, SSE, insert_gates
from omniconv.models.dense.fcnn import FCNN
from omniconv.papers.check import Check, shared_data
from omniconv.papers.small import Split, standardise, train

CHANNELS = (16, 64, 128)
ERROR = 1e-6
SHARE = (0.01, 0.02)
MARGIN = -0.002
WINS = 2
SEEDS = (0, 1, 2)
CROP, CROPS, BATCH = 48, 1000, 8


def count(module: nn.Module, dims: int = 0) -> int:
    """Return the number of parameters of at least so many axes: more than the biases have, for weights alone."""
    return sum(p.numel() for p in module.parameters() if p.ndim >= dims)


def loop_error() -> float:
    """Return the largest difference of the pixel gate from a dot product and a sigmoid at every pixel."""
    torch.manual_seed(0)
    layer, x = SSE(7).double(), torch.randn(2, 7, 5, 4, dtype=torch.float64)
    y, worst = layer(x).detach(), 0.0
    weight, bias = layer.weight.tolist(), layer.bias.item()
    for n, i, j in np.ndindex(2, 5, 4):
        pixel = x[n, :, i, j].tolist()
        gate = 1 / (1 + math.exp(-sum(w * u for w, u in zip(weight, pixel, strict=True)) - bias))
        worst = max(worst, *(abs(float(y[n, c, i, j]) - gate * pixel[c]) for c in range(7)))
    return worst


def commutation() -> dict[str, float]:
    """Return by how much cSE fails to commute with a permutation of the pixels, and sSE with flips."""
    torch.manual_seed(1)
    cse, sse, x = CSE(8).double(), SSE(8).double(), torch.randn(2, 8, 6, 5, dtype=torch.float64)
    order = torch.randperm(30)

    def permute(x: Tensor) -> Tensor:
        return x.flatten(2)[:, :, order].unflatten(2, (6, 5))

    with torch.no_grad():
        return {
            "cse": float((cse(permute(x)) - permute(cse(x))).abs().max()),
            "sse": max(float((sse(x.flip(axes)) - sse(x).flip(axes)).abs().max()) for axes in (2, 3, (2, 3))),
        }


def membranes() -> tuple[Split, Split]:
    """Return slices 0 to 14 for training and 15 to 19 for the test, with labels 1 for cells and 0 for membranes."""

    def read(tar: tarfile.TarFile, kind: str, index: int) -> Tensor:
        name = next(n for n in tar.getnames() if n.endswith(f"{kind}/{index}.png"))
        member = tar.extractfile(name)
        assert member is not None
        return torch.from_numpy(np.array(Image.open(io.BytesIO(member.read())).convert("L"))).float()

    with tarfile.open(shared_data("segmentation") / "isbi2012-membrane-00-19.tar") as tar:
        images, labels = (
            F.avg_pool2d(torch.stack([read(tar, kind, index) for index in range(20)])[:, None], 4)
            for kind in ("image", "label")
        )
    images, masks = standardise(images, images[:15]), (labels[:, 0] > 127).long()
    return (images[:15], masks[:15]), (images[15:], masks[15:])


def crops(split: Split) -> Split:
    """Return crops of the slices, each mirrored and turned at random."""
    random = generator(0, "crops")
    images, masks = split
    x, y = [], []
    for _ in range(CROPS):
        slice_, top, left, turns, mirror = (
            int(torch.randint(bound, (), generator=random))
            for bound in (len(images), images.shape[2] - CROP, images.shape[3] - CROP, 4, 2)
        )
        window = (slice(top, top + CROP), slice(left, left + CROP))
        image, mask = images[slice_, 0][window].rot90(turns), masks[slice_][window].rot90(turns)
        x.append((image.flip(0) if mirror else image)[None])
        y.append(mask.flip(0) if mirror else mask)
    return torch.stack(x), torch.stack(y)


@torch.no_grad()
def dice(model: nn.Module, split: Split) -> float:
    """Return the mean of both classes' Dice scores over all pixels of the split."""
    images, masks = split
    found = model.eval()(images).argmax(1)
    scores = [
        2 * float(((found == c) & (masks == c)).sum()) / float((found == c).sum() + (masks == c).sum())
        for c in (0, 1)
    ]
    return sum(scores) / 2


def make_network(seed: int, *, gated: bool) -> nn.Module:
    """Return a small U-Net, with a gate behind every block if `gated`."""
    torch.manual_seed(derive(seed, "weights"))
    model = FCNN("unet", width=16, levels=3, kernel_size=3)
    return insert_gates(model, torch.zeros(1, 1, CROP, CROP), model.blocks) if gated else model


def run(check: Check) -> None:
    """Measure counts, the gates, and a small training."""
    right = sum(count(CSE(c), 2) == c * c for c in CHANNELS)
    check.require("channel gates of 16, 64 and 128 channels with C^2 weights at r = 2", right, "==", 3)
    right = sum(count(SSE(c), 1) == c for c in CHANNELS)
    check.require("pixel gates of 16, 64 and 128 channels with C weights", right, "==", 3)
    check.require("difference of the pixel gate from a loop", loop_error(), "<=", ERROR)
    failures = commutation()
    check.require("cSE of permuted pixels minus permuted pixels of cSE", failures["cse"], "<", ERROR)
    check.require("sSE of a flipped image minus the flipped image of sSE", failures["sse"], "<", ERROR)

    plain = FCNN("unet")
    gated = insert_gates(plain, torch.zeros(1, 1, 16, 16), plain.blocks)
    share = count(gated) / count(plain) - 1
    check.require("share of parameters that scSE adds to the U-Net", share, ">=", SHARE[0])
    check.require("share of parameters that scSE adds to the U-Net", share, "<=", SHARE[1])

    training, test = membranes()
    training = crops(training)
    scores: dict[bool, list[float]] = {True: [], False: []}
    for seed in SEEDS:
        for gates in scores:
            model = make_network(seed, gated=gates)
            train(model, training, epochs=1, batch=BATCH, lr=3e-3, seed=seed, shift=0, flip=False)
            scores[gates].append(dice(model, test))
    means = {gates: sum(values) / len(values) for gates, values in scores.items()}
    check.require(
        "Dice with minus without scSE, membranes, mean of 3 seeds",
        means[True] - means[False], ">=", MARGIN, baseline=means[False],
    )  # fmt: skip
    wins = sum(a > b for a, b in zip(scores[True], scores[False], strict=True))
    check.require("seeds of 3 in which the U-Net with scSE is better", wins, ">=", WINS)
    rounded = {gates: [round(value, 4) for value in values] for gates, values in scores.items()}
    check.note(f"Dice with scSE {rounded[True]}, without {rounded[False]}")
