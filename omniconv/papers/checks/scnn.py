"""Messages that run slice by slice over a map carry evidence across the whole of it, which finds lanes through gaps
that a stack of convolutions with as many weights cannot bridge.

The pictures are drawn: two curved lanes on noise with short strokes beside them, both unpainted over a part of
their rows. As in the paper, the loss weighs background by 0.4, a lane is read off as the most probable place of
every second row, lanes are drawn thick (5 of 96 pixels) and found if their IoU is above 0.5, and F1 is taken over
all lanes. Three networks have the same trunk, budget and number of weights: with Spatial CNN, with four 3x3
convolutions in its place, and with messages that all rows or columns send at once.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.seeds import derive, generator
from omniconv.design.cost import count_cost
from omniconv.layers.conv.scnn import SpatialCNN
from omniconv.papers.check import Check

WEIGHTS = 589_824
ERROR = 1e-6
MACS_SHARE = 0.95
GAIN = 3.0
SEEDS = (0, 1, 2)
HEIGHT, WIDTH, THICK = 64, 96, 5
CHANNELS = 16
TRAINING, TEST, STEPS, BATCH = 1600, 200, 300, 16
HIDDEN = {"low": 0.2, "high": 0.6}


class OneShot(SpatialCNN):
    """Messages of all slices at once: every slice hears what its neighbour held before the pass."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the map after four passes."""
        for direction, (axis, step) in zip(self.directions, ((2, 1), (2, -1), (3, 1), (3, -1)), strict=True):
            kernel = self.weight[direction].unsqueeze(axis)
            before = torch.roll(x, step, axis)
            edge = torch.zeros_like(x).select(axis, 0)
            before = before.select_scatter(edge, axis, 0 if step == 1 else x.shape[axis] - 1)
            x = x + F.relu(F.conv2d(before, kernel, padding=(0, 4) if axis == 2 else (4, 0)))
        return x


def by_loop(layer: SpatialCNN, x: Tensor) -> Tensor:
    """The layer as the paper writes it, for one picture (C, H, W)."""
    for name, turn, back in (
        ("down", lambda y: y, lambda y: y),
        ("up", lambda y: y.flip(1), lambda y: y.flip(1)),
        ("right", lambda y: y.mT, lambda y: y.mT),
        ("left", lambda y: y.flip(2).mT, lambda y: y.mT.flip(2)),
    ):
        weight = layer.weight[name]
        y = turn(x).clone()
        for i in range(1, y.shape[1]):
            padded = F.pad(y[:, i - 1], (weight.shape[2] // 2,) * 2)
            for j in range(y.shape[2]):
                message = torch.einsum("dcw,cw->d", weight, padded[:, j : j + weight.shape[2]])
                y[:, i, j] = y[:, i, j] + message.clamp(min=0)
        x = back(y)
    return x


def check_layer(check: Check) -> None:
    """Measure counts, the loop, and how far messages go."""
    layer = SpatialCNN(128, 9, device="meta")
    cost = count_cost(layer, (128, 36, 100))
    check.require("weights of 128 channels and kernels of 9", cost.parameters, "==", WEIGHTS)
    steps = 2 * (35 * 100 + 99 * 36) * 128 * 128 * 9
    check.require("multiply-adds at 36 x 100: two slices less than rows and columns", cost.macs, "==", steps)
    share = cost.macs / (4 * 36 * 100 * 128 * 128 * 9)
    check.require("the same as a share of 4 H W C C w", share, ">=", MACS_SHARE)
    torch.manual_seed(0)
    layer = SpatialCNN(4, 5)
    x = torch.randn(1, 4, 9, 7)
    with torch.no_grad():
        expected = by_loop(layer, x[0])
        error = float((layer(x)[0] - expected).abs().max() / expected.abs().max())
    check.require("difference from a loop over pixels", error, "<=", ERROR)
    stack = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(4)))
    carried = []
    for module in (SpatialCNN(4, 9, ("down",)), stack):
        for parameter in module.parameters():
            nn.init.uniform_(parameter, 0.0, 0.1)
        x = torch.rand(1, 4, 24, 16, requires_grad=True)
        (gradient,) = torch.autograd.grad(module(x)[0, :, -1].sum(), x)
        carried.append(float(gradient[0, :, 0].abs().max()))
    check.require("gradient of the bottom row by the top row, after the downward pass", carried[0], ">", 0)
    check.require("the same after four 3x3 convolutions of as many weights", carried[1], "==", 0)


def draw(count: int, hidden: float | None, name: str) -> tuple[Tensor, Tensor]:
    """Return pictures (N, 1, H, W) and lanes (N, 2, H), their columns.

    A share `hidden` of the rows of every lane is unpainted, in blocks of eight rows; if None, 0.1 to 0.7.
    """
    random = generator(0, "lanes", name)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=random)

    height = torch.linspace(0, 1, HEIGHT)
    top = uniform(0.35, 0.6, count, 1, 1)
    spread = torch.stack((uniform(-0.45, -0.15, count), uniform(0.2, 0.5, count)), 1)[:, :, None]
    bend = uniform(-0.35, 0.35, count, 1, 1)
    gap = torch.tensor([-0.04, 0.04])[:, None]
    lanes = WIDTH * (top + gap + spread * height + bend * height * (1 - height))
    share = uniform(0.1, 0.7, count, 1, 1) if hidden is None else torch.full((count, 1, 1), hidden)
    painted = (torch.rand(count, 2, HEIGHT // 8, generator=random) >= share).repeat_interleave(8, 2)
    columns = torch.arange(WIDTH) + 0.5
    ink = ((columns - lanes[..., None]).abs() < 1.2) & painted[..., None]
    pictures = 0.3 * torch.randn(count, HEIGHT, WIDTH, generator=random) + 1.5 * ink.any(1)
    rows = torch.arange(HEIGHT)[:, None]
    for _ in range(4):
        # A stroke as thick and bright as a lane, eight rows long, that continues nothing.
        start, place, slant = (
            uniform(low, high, count, 1, 1) for low, high in ((0, HEIGHT), (0, WIDTH), (-1.5, 1.5))
        )
        along = rows - start
        pictures += 1.5 * ((along >= 0) & (along < 8) & ((columns - place - slant * along).abs() < 1.2))
    return pictures[:, None], lanes


def paint(lanes: Tensor) -> Tensor:
    """Return thick lanes (..., H, W) of columns (..., H); rows of NaN stay empty."""
    return (torch.arange(WIDTH) + 0.5 - lanes[..., None]).abs() < THICK / 2


def make_network(kind: str, seed: int) -> nn.Module:
    """Return the trunk with one of the three ways to carry evidence."""
    torch.manual_seed(derive(seed, "weights"))
    layers: list[nn.Module] = []
    for inside, stride in ((1, 2), (CHANNELS, 2), (CHANNELS, 1)):
        conv = nn.Conv2d(inside, CHANNELS, 3, stride, 1, bias=False)
        layers += [conv, nn.BatchNorm2d(CHANNELS), nn.ReLU()]
    if kind == "convolutions":
        for _ in range(4):
            layers += [nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False), nn.ReLU()]
    else:
        layers.append((SpatialCNN if kind == "scnn" else OneShot)(CHANNELS, 9))
    return nn.Sequential(*layers, nn.Conv2d(CHANNELS, 3, 1), nn.Upsample(scale_factor=4, mode="bilinear"))


def fit(model: nn.Module, pictures: Tensor, lanes: Tensor, seed: int) -> None:
    """Train to tell background, left and right lane."""
    labels = (paint(lanes).long() * torch.tensor([1, 2])[:, None, None]).amax(1)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=STEPS, pct_start=0.2)
    weights, random = torch.tensor([0.4, 1.0, 1.0]), generator(seed, "train")
    for _ in range(STEPS):
        chosen = torch.randint(len(pictures), (BATCH,), generator=random)
        loss = F.cross_entropy(model(pictures[chosen]), labels[chosen], weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def f1(model: nn.Module, pictures: Tensor, lanes: Tensor) -> float:
    """Return 100 times the F1 of lanes whose thick drawings overlap the true ones by more than a half."""
    probable = model.eval()(pictures).softmax(1)[:, 1:]
    peak, place = probable[:, :, ::2].max(3)
    columns = torch.where(peak > 0.3, place + 0.5, torch.nan)
    found = columns.isfinite().sum(2) > 1
    drawn, true = paint(columns), paint(lanes[:, :, ::2])
    overlap = (drawn & true).sum((2, 3)) / (drawn | true).sum((2, 3))
    right = int((found & (overlap > 0.5)).sum())
    return 100 * 2 * right / (int(found.sum()) + found.numel())


def run(check: Check) -> None:
    """Measure the layer, and lanes found through gaps."""
    check_layer(check)
    pictures, lanes = draw(TRAINING, None, "train")
    tests = {name: draw(TEST, share, name) for name, share in HIDDEN.items()}
    scores: dict[str, dict[str, list[float]]] = {
        kind: {name: [] for name in HIDDEN} for kind in ("scnn", "convolutions", "one shot")
    }
    for seed in SEEDS:
        for kind, found in scores.items():
            model = make_network(kind, seed)
            fit(model, pictures, lanes, seed)
            for name, test in tests.items():
                found[name].append(f1(model, *test))
    means = {
        kind: {name: sum(values) / len(values) for name, values in found.items()}
        for kind, found in scores.items()
    }
    gain = {name: means["scnn"][name] - means["convolutions"][name] for name in HIDDEN}
    check.require(
        "F1 with SCNN minus with 3x3 convolutions of equal weights, 60% of the lanes hidden, mean of 3 seeds",
        gain["high"], ">=", GAIN, baseline=means["convolutions"]["high"], unit="points",
    )  # fmt: skip
    check.require(
        "that gain minus the one at 20% hidden", gain["high"] - gain["low"], ">", 0, baseline=gain["low"], unit="points"
    )  # fmt: skip
    check.require(
        "F1 with messages in sequence minus all at once, 60% hidden",
        means["scnn"]["high"] - means["one shot"]["high"], ">=", 0, baseline=means["one shot"]["high"], unit="points",
    )  # fmt: skip
    check.note(f"F1 {scores}")
