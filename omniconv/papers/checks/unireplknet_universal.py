"""One large-kernel network learns from sound, series, points and video through front ends whose every pixel is a known
piece of data; it sees wider than 3x3 kernels of equal cost, before and after training, and goes more by shape.

Spoken digits and the series of ETTh1 are real; point clouds, clips of moving digits and digits filled with textures
are generated. The linear forecast is the best one there is: least squares over all windows of the training part, in the
network's own units.
"""

import csv
import gzip
import io
import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.seeds import derive, generator
from omniconv.design.cost import count_cost
from omniconv.inspect.receptive_field import receptive_field
from omniconv.inspect.shape_bias import shape_bias
from omniconv.models.factory import create_model, get_variant
from omniconv.models.image.unireplknet import UniRepLKNet, UniRepLKNetConfig
from omniconv.models.image.unireplknet_universal import (
    DepthViews,
    Forecaster,
    FrameTiles,
    LogMel,
    SeriesMap,
    UniversalUniRepLKNet,
)
from omniconv.papers.check import Check, shared_data
from omniconv.papers.checks.multires_conv import spoken_digits
from omniconv.papers.small import Split, accuracy, digits, fashion_mnist, train

PUBLISHED = {
    "unireplknet_a": (4.4e6, None),
    "unireplknet_f": (6.2e6, 0.9e9),
    "unireplknet_p": (10.7e6, 1.6e9),
    "unireplknet_n": (18.3e6, 2.8e9),
    "unireplknet_t": (31e6, 4.9e9),
    "unireplknet_s": (56e6, 9.1e9),
    "unireplknet_b": (98e6, None),
}
PARAMETER_ERROR, MAC_ERROR = 0.01, 0.03
SPOKEN, CLOUDS, CLIPS = 80.0, 85.0, 85.0
WINDOW, HORIZON = 96, 24
STEPS, WINDOWS = 150, 8
AREA, SHARE = 2.0, 0.5
COST_MISMATCH = 0.05
SEEDS = (0, 1, 2)

NETWORK = UniRepLKNetConfig((1, 1, 2, 1), (16, 32, 48, 64), 13, (0, 1, 2, 1), layer_scale=1.0)
LARGE = UniRepLKNetConfig((1, 1, 2, 1), (16, 32, 48, 64), 13, (0, 1, 1, 1), layer_scale=1.0)
# 3x3 kernels throughout, and as much deeper as the large kernels cost.
SMALL = replace(LARGE, depths=(1, 2, 2, 2), large_every=(0, 0, 0, 0))


def _counts(check: Check) -> None:
    for name, (parameters, macs) in PUBLISHED.items():
        size = get_variant(name).size
        cost = count_cost(create_model(name, device="meta").deploy(), (3, size, size))
        error = abs(cost.parameters / parameters - 1)
        check.require(f"{name}: parameters of the deployed form off by", error, "<=", PARAMETER_ERROR)
        if macs is not None:
            check.require(f"{name}: multiply-adds off by", abs(cost.macs / macs - 1), "<=", MAC_ERROR)


@torch.no_grad()
def _fronts(check: Check) -> None:
    """Follow every pixel of small maps back to its data."""
    random = generator(0, "fronts")
    wrong = 0
    video = torch.randn(1, 6, 2, 4, 5, generator=random)
    front = FrameTiles(3, 2)
    y = front(video)
    for row in range(y.shape[2]):
        for column in range(y.shape[3]):
            frame, i, j = front.pixel(row, column, 4, 5)
            wrong += not torch.equal(y[0, :, row, column], video[0, frame, :, i, j])
    points = torch.rand(2, 60, 3, generator=random) * 2 - 1
    views = DepthViews(6)
    y, shown = views(points), views.points(points)
    for n, view in ((n, view) for n in range(2) for view in range(3)):
        depth = torch.where(shown[n, view] >= 0, (points[n, shown[n, view], view] + 1) / 2, 0.0)
        wrong += int((depth - y[n, view]).abs().gt(1e-6).sum())
    series, fold = torch.randn(1, 12, 3, generator=random), SeriesMap(3, 6, 9)
    y, token = fold(series), fold.token(series.transpose(1, 2))
    for row in range(8):
        for column in range(9):
            step, entry = fold.step(row, column)
            wrong += not torch.equal(y[0, 0, row, column], token[0, entry, step])
    sound, mel = torch.randn(1, 500, generator=random), LogMel(8000, 16, 64, 24)
    y = mel(sound)
    for column in range(y.shape[3]):
        samples = mel.samples(column)
        other = torch.zeros_like(sound)
        other[:, samples.start : samples.stop] = sound[:, samples.start : samples.stop]
        wrong += not torch.allclose(mel(other)[..., column], y[..., column], atol=1e-5)
    check.require(
        "pixels of the four front ends' maps that are not the data they are said to be", wrong, "==", 0
    )


def point_clouds(count: int, seed: int) -> Split:
    """Return clouds (N, 256, 3) on spheres, cubes, cylinders, cones, rings and crossed sheets, and which they are."""
    random = generator(seed, "clouds")
    labels = torch.arange(count) % 6
    u, v = torch.rand(2, count, 256, generator=random)
    angle, z = 2 * math.pi * u, 2 * v - 1
    circle = torch.stack([angle.cos(), angle.sin()], -1)

    def turned(radius: Tensor) -> Tensor:
        return torch.cat([circle * radius[..., None], z[..., None]], -1)

    tube = 2 * math.pi * v
    ring = torch.cat([circle * (0.7 + 0.3 * tube.cos())[..., None], 0.3 * tube.sin()[..., None]], -1)
    cube = torch.stack([2 * u - 1, z, (2 * torch.rand(count, 256, generator=random)).floor() * 2 - 1], -1)
    face = torch.randint(3, (count, 256, 1), generator=random)
    cube = cube.gather(2, (torch.arange(3) + face) % 3)
    side = torch.randint(2, (count, 256, 1), generator=random) == 0
    flat = torch.zeros_like(u)
    sheets = torch.where(side, torch.stack([2 * u - 1, flat, z], -1), torch.stack([flat, 2 * u - 1, z], -1))
    kinds = [turned((1 - z * z).sqrt()), cube, turned(torch.ones_like(z)), turned((1 - z) / 2), ring, sheets]
    points = torch.stack(kinds)[labels, torch.arange(count)]
    scale = 0.5 + 0.3 * torch.rand(count, 1, 3, generator=random)
    turn = 2 * math.pi * torch.rand(count, generator=random)
    rotation = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], -1).unflatten(1, (2, 2))
    points = points * scale
    points = torch.cat([points[..., :2] @ rotation, points[..., 2:]], -1)
    return points + 0.02 * torch.randn(points.shape, generator=random), labels


def clips(split: Split, count: int, seed: int) -> Split:
    """Return clips (N, 9, 1, 16, 16) of a digit that moves left, right, up or down, and which way."""
    random = generator(seed, "clips")
    images = split[0][torch.randint(len(split[0]), (count,), generator=random)]
    labels = torch.arange(count) % 4
    frames = 0.3 * torch.randn(count, 9, 1, 16, 16, generator=random)
    start = torch.randint(3, 6, (count, 2), generator=random).tolist()
    ways = ((0, -1), (0, 1), (-1, 0), (1, 0))
    for n, (y, x) in enumerate(start):
        dy, dx = ways[int(labels[n])]
        for t in range(9):
            top, left = (min(8, max(0, p + d * (t - 4))) for p, d in ((y, dy), (x, dx)))
            frames[n, t, :, top : top + 8, left : left + 8] += images[n]
    return frames, labels


def _learn(front: nn.Module, training: Split, test: Split, epochs: float) -> float:
    torch.manual_seed(derive(0, "weights"))
    model = UniversalUniRepLKNet(front, NETWORK, int(training[1].max()) + 1)
    train(model, training, epochs=epochs, batch=32, shift=0, flip=False)
    return accuracy(model, test, 100)


def _modalities(check: Check) -> None:
    training, test = ((x[:, 0], y) for x, y in spoken_digits())
    found = _learn(LogMel(8000, 64, 256, 96), training, test, 2)
    check.require("accuracy on spoken digits", found, ">=", SPOKEN, unit="%")
    found = _learn(DepthViews(48), point_clouds(900, 0), point_clouds(300, 1), 4)
    check.require("accuracy on generated point clouds of six kinds", found, ">=", CLOUDS, unit="%")
    known, unseen = digits()
    found = _learn(FrameTiles(3, 1), clips(known, 900, 0), clips(unseen, 300, 1), 4)
    check.require("accuracy on the way of moving digits, of four", found, ">=", CLIPS, unit="%")


def etth1() -> tuple[Tensor, Tensor]:
    """Return the training and the test part (steps, 7) of ETTh1, in units of the training part's deviations."""
    text = gzip.decompress((shared_data("timeseries") / "ETTh1.csv.gz").read_bytes()).decode()
    rows = list(csv.reader(io.StringIO(text)))[1:]
    values = torch.tensor(np.array([row[1:] for row in rows], np.float32))
    known = values[:8640]
    values = (values - known.mean(0)) / known.std(0, correction=0)
    return values[:8640], values[11520 - WINDOW : 14400]


def _windows(series: Tensor) -> tuple[Tensor, Tensor]:
    """Return all windows (N, WINDOW, 7) of a series and what follows each (N, HORIZON, 7)."""
    both = series.unfold(0, WINDOW + HORIZON, 1).transpose(1, 2)
    return both[:, :WINDOW], both[:, WINDOW:]


def _forecasts(check: Check) -> None:
    training, test = (_windows(part) for part in etth1())
    torch.manual_seed(derive(0, "weights"))
    model = Forecaster(HORIZON, NETWORK, embedding=16, width=64)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=STEPS, pct_start=0.2)
    random = generator(0, "windows")
    model.train()
    for _ in range(STEPS):
        chosen = torch.randint(len(training[0]), (WINDOWS,), generator=random)
        loss = F.mse_loss(model(training[0][chosen]), training[1][chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()

    # Every tenth window of the test part, for everybody.
    x, y = test[0][::10], test[1][::10]
    with torch.no_grad():
        model.eval()
        guesses = torch.cat([model(part) for part in x.split(32)])
    ours = float(F.mse_loss(guesses, y))
    last = float(F.mse_loss(x[:, -1:].expand_as(y), y))

    def units(part: Tensor) -> tuple[Tensor, Tensor]:
        return part.mean(1, keepdim=True), (part.var(1, keepdim=True, correction=0) + 1e-5).sqrt()

    mean, scale = units(training[0])
    known = ((training[0] - mean) / scale).transpose(1, 2).flatten(0, 1).double()
    follows = ((training[1] - mean) / scale).transpose(1, 2).flatten(0, 1).double()
    known = torch.cat([known, torch.ones(len(known), 1, dtype=known.dtype)], 1)
    # The windows' deviations weigh their squared errors as the loss of the forecast does.
    weight = scale.transpose(1, 2).flatten(0, 1).double()
    gram = (known * weight**2).T @ known + 1e-3 * torch.eye(known.shape[1], dtype=known.dtype)
    best = torch.linalg.solve(gram, (known * weight**2).T @ follows)
    mean, scale = units(x)
    seen = ((x - mean) / scale).transpose(1, 2).flatten(0, 1).double()
    seen = torch.cat([seen, torch.ones(len(seen), 1, dtype=seen.dtype)], 1)
    line = (seen @ best).float().unflatten(0, (len(x), x.shape[2])).transpose(1, 2) * scale + mean
    linear = float(F.mse_loss(line, y))
    claim = f"squared error on ETTh1, {HORIZON} hours from {WINDOW}"
    check.require(f"{claim}, against repeating the last value", ours, "<", last, baseline=last)
    check.require(f"{claim}, against the best linear forecast", ours, "<", linear, baseline=linear)


def _area(model: UniRepLKNet, x: Tensor) -> float:
    """Return the share of the picture's area that half of the gradient comes from, norms set by the pictures."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    for norm in norms:
        norm.momentum = 0.1
    return receptive_field(model, x).area_ratio(SHARE)


def _fields(check: Check) -> None:
    costs = [count_cost(UniRepLKNet(config, 10, 1).deploy(), (1, 128, 128)).macs for config in (LARGE, SMALL)]
    check.require(
        "cost of the 3x3 network off that of the 13x13 one by",
        abs(costs[1] / costs[0] - 1),
        "<=",
        COST_MISMATCH,
    )
    (images, labels), _ = fashion_mnist(1600, 1)
    look = F.interpolate(images[:8], size=(128, 128), mode="bilinear")
    split = F.interpolate(images, size=(56, 56), mode="bilinear"), labels
    areas: dict[str, list[float]] = {"new": [], "trained": []}
    for config in (LARGE, SMALL):
        torch.manual_seed(derive(0, "weights"))
        model = UniRepLKNet(config, 10, 1)
        areas["new"].append(_area(model, look))
        train(model, split, epochs=1, batch=32, shift=0)
        areas["trained"].append(_area(model, look))
    for state, (large, small) in areas.items():
        check.require(
            f"area that half of the gradient comes from, 13x13 over 3x3 network, {state}",
            large / small, ">=", AREA,
        )  # fmt: skip
    check.note(f"shares of the picture (13x13, 3x3): {areas}")


def textured(split: Split, textures: Tensor, seed: int) -> Tensor:
    """Return the digits of a split, 32 x 32, filled with the gratings of given classes."""
    random = generator(seed, "textures")
    count = len(textures)
    axis = torch.arange(32.0)
    turn = math.pi * (textures % 5) / 5
    pace = torch.where(textures < 5, 0.8, 1.6)
    phase = 2 * math.pi * torch.rand(count, generator=random)
    along = turn.cos()[:, None, None] * axis[:, None] + turn.sin()[:, None, None] * axis
    grating = (pace[:, None, None] * along + phase[:, None, None]).sin()
    shape = F.interpolate(split[0], size=(32, 32), mode="bilinear")[:, 0].sigmoid()
    noise = 0.1 * torch.randn(count, 32, 32, generator=random)
    return (shape * grating + noise)[:, None]


def _shape(check: Check) -> None:
    known, unseen = digits()
    shapes = unseen[1]
    others = (shapes + 1 + torch.randint(9, shapes.shape, generator=generator(0, "conflict"))) % 10
    conflict = textured(unseen, others, 1)
    scores: dict[str, list[float]] = {"13x13": [], "3x3": []}
    for seed in SEEDS:
        split = textured(known, known[1], 2 + seed), known[1]
        for kind, config in (("13x13", LARGE), ("3x3", SMALL)):
            torch.manual_seed(derive(seed, "weights"))
            model = UniRepLKNet(config, 10, 1)
            train(model, split, epochs=2, batch=32, seed=seed, shift=0, flip=False)
            scores[kind].append(100 * shape_bias(model.eval(), conflict, shapes, others))
    means = {kind: sum(values) / len(values) for kind, values in scores.items()}
    check.require(
        "shape bias of the 13x13 network, against that of the 3x3 network, mean of 3 seeds",
        means["13x13"], ">=", means["3x3"], baseline=means["3x3"], unit="%",
    )  # fmt: skip
    check.note(f"shape bias of 13x13 {scores['13x13']}, of 3x3 {scores['3x3']}")


def run(check: Check) -> None:
    """Measure counts, front ends, four modalities, receptive fields, and shape bias."""
    _counts(check)
    _fronts(check)
    _modalities(check)
    _forecasts(check)
    _fields(check)
    _shape(check)
