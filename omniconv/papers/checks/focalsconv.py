"""Focal sparse convolution lies between submanifold and regular sparse convolution, and learns where to lie: after a
short training it activates far fewer sites outside of objects than the regular one, and covers more of the objects
than the submanifold one.

Scenes are made here: boxes of which a sensor at the origin sees two faces, a part of each cut away by occlusion, on a
sparse ground with poles, bushes and stray voxels. The network is two submanifold convolutions and one focal one, the
loss is objectness at the output sites plus the focal loss on the importance of the centre. The sites of the two
baselines depend on the input alone, so they need no training.
"""

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.seeds import derive, generator
from omniconv.layers.conv.focal_sparse import FocalConv3d
from omniconv.layers.conv.sparse import SparseConv3d, SubmanifoldConv3d, active_sites
from omniconv.losses.focal import SigmoidFocalLoss
from omniconv.ops.sparse_conv.tensor import SparseTensor
from omniconv.papers.check import Check

ERROR = 1e-5
CLOUDS = 100
FALL = 40.0
GAIN = 5.0
SEEDS = (0, 1, 2)
GRID = (10, 32, 32)
STEPS, BATCH, CHANNELS = 400, 4, 16
TEST_SCENES = 64


def limit_error(importance: float) -> float:
    """Return the largest difference from a dense (1) or dense masked (0) convolution at one importance everywhere."""
    worst = 0.0
    for seed in range(5):
        torch.manual_seed(seed)
        x = torch.randn(2, 8, 9, 11, 7) * (torch.rand(2, 1, 9, 11, 7) < 0.1)
        layer = FocalConv3d(8, 12, bias=False)
        sparse = SparseTensor.from_dense(x)
        logits = layer.importance(sparse)
        with torch.no_grad():
            y = layer(
                sparse, logits.replace(torch.full_like(logits.features, 200 * importance - 100))
            ).dense()
            dense = F.conv3d(x, layer.conv.weight, padding=1)
        worst = max(worst, float((y - (dense if importance else dense * active_sites(x))).abs().max()))
    return worst


def grown_as_a_set(seed: int) -> bool:
    """Return whether a random cloud's output sites are those that a loop over sets finds."""
    torch.manual_seed(seed)
    shape = (6, 8, 7)
    cloud = SparseTensor.from_dense(torch.randn(2, 4, *shape) * (torch.rand(2, 1, *shape) < 0.08))
    layer = FocalConv3d(4, 5)
    logits = layer.importance(cloud)
    importance = logits.features.detach().sigmoid().tolist()
    wanted = {tuple(site) for site in cloud.coordinates.tolist()}
    for site, row in zip(cloud.coordinates.tolist(), importance, strict=True):
        if row[13] > 0.5:
            for tap, offset in enumerate(itertools.product((-1, 0, 1), repeat=3)):
                place = [p + o for p, o in zip(site[1:], offset, strict=True)]
                if row[tap] >= 0.5 and all(0 <= p < size for p, size in zip(place, shape, strict=True)):
                    wanted.add((site[0], *place))
    found = [tuple(site) for site in layer(cloud, logits).coordinates.tolist()]
    return len(found) == len(wanted) and set(found) == wanted


def gradient() -> float:
    """Return the largest gradient that a loss on the output alone gives to the predictor."""
    torch.manual_seed(0)
    layer = FocalConv3d(4, 5)
    x = SparseTensor.from_dense(torch.randn(2, 4, 6, 8, 7) * (torch.rand(2, 1, 6, 8, 7) < 0.2))
    layer(x).features.square().mean().backward()
    assert layer.predictor.weight.grad is not None
    return float(layer.predictor.weight.grad.abs().max())


def make_scene(random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return (occupied, inside a box), both bool of the grid's sizes."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=random))

    def chance(share: float, *sizes: int) -> Tensor:
        return torch.rand(sizes, generator=random) < share

    depth, height, width = GRID
    occupied = torch.zeros(GRID, dtype=torch.bool)
    occupied[0] = chance(0.15, height, width)
    for _ in range(6):
        occupied[: draw(4, depth), draw(0, height), draw(0, width)] = True
    for _ in range(4):
        y, x = draw(0, height - 4), draw(0, width - 4)
        occupied[0:4, y : y + 4, x : x + 4] |= chance(0.4, 4, 4, 4)
    occupied |= chance(60 / occupied.numel(), *GRID)
    inside, seen = torch.zeros_like(occupied), torch.zeros_like(occupied)
    for _ in range(3):
        sizes = draw(3, 6), draw(5, 10), draw(4, 7)
        z, y, x = 1, draw(0, height - sizes[1]), draw(0, width - sizes[2])
        box = (slice(z, z + sizes[0]), slice(y, y + sizes[1]), slice(x, x + sizes[2]))
        faces = torch.zeros(sizes, dtype=torch.bool)
        faces[:, 0], faces[:, :, 0] = True, True
        # Something in front hides one end of the box.
        faces[:, draw(sizes[1] // 2, sizes[1]) :] = False
        inside[box], seen[box] = True, faces & chance(0.9, *sizes)
    return torch.where(inside, seen, occupied), inside


def make_batch(random: torch.Generator, count: int) -> tuple[SparseTensor, Tensor]:
    """Return scenes with features (1, height), and the sites inside boxes, (N, *grid)."""
    occupied, inside = (
        torch.stack(part) for part in zip(*(make_scene(random) for _ in range(count)), strict=True)
    )
    sites = occupied.nonzero()
    features = torch.stack([torch.ones(len(sites)), sites[:, 1] / GRID[0]], 1)
    return SparseTensor(features, sites, GRID, count), inside


class Network(nn.Module):
    """Two submanifold convolutions, a focal one, and the objectness of every site."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.ModuleList([SubmanifoldConv3d(2, CHANNELS), SubmanifoldConv3d(CHANNELS, CHANNELS)])
        self.focal = FocalConv3d(CHANNELS, CHANNELS)
        self.norms = nn.ModuleList([nn.BatchNorm1d(CHANNELS) for _ in range(3)])
        self.head = nn.Linear(CHANNELS, 1)

    def forward(self, x: SparseTensor) -> tuple[SparseTensor, SparseTensor]:
        """Return the objectness and the importance, both as logits."""
        *norms, last = self.norms
        for conv, norm in zip(self.stem, norms, strict=True):
            x = conv(x)
            x = x.replace(norm(x.features).relu())
        logits = self.focal.importance(x)
        y = self.focal(x, logits)
        return y.replace(self.head(last(y.features).relu())), logits


def train(seed: int) -> Network:
    """Return a network trained on fresh scenes."""
    torch.manual_seed(derive(seed, "weights"))
    random = generator(seed, "scenes")
    network, focal = Network(), SigmoidFocalLoss(alpha=None)
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS, pct_start=0.2)
    for _ in range(STEPS):
        x, inside = make_batch(random, BATCH)
        y, logits = network(x)
        target = inside[tuple(y.coordinates.T)].float()[:, None]
        loss = F.binary_cross_entropy_with_logits(y.features, target)
        loss = loss + focal(logits.features[:, 13], inside[tuple(x.coordinates.T)].float())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def cover(sites: Tensor, inside: Tensor) -> tuple[int, float]:
    """Return how many sites lie outside of boxes, and the percentage of the boxes' volume that sites cover."""
    hit = int(inside[tuple(sites.T)].sum())
    return len(sites) - hit, 100 * hit / int(inside.sum())


def run(check: Check) -> None:
    """Measure the limits, the output sites, the gradient, and a small training."""
    check.require(
        "difference from the regular convolution at importance 1, float32", limit_error(1), "<=", ERROR
    )
    check.require(
        "difference from the submanifold convolution at importance 0, float32", limit_error(0), "<=", ERROR
    )
    right = sum(grown_as_a_set(seed) for seed in range(CLOUDS))
    check.require("random clouds whose output sites equal a brute-force set", right, "==", CLOUDS)
    check.require("gradient of the predictor from a loss on the output", gradient(), ">", 0)

    x, inside = make_batch(generator(0, "test scenes"), TEST_SCENES)
    with torch.no_grad():
        outside, covered = cover(SparseConv3d(2, 1, padding=1)(x).coordinates, inside)
        few, base = cover(x.coordinates, inside)
    trained = []
    for seed in SEEDS:
        network = train(seed)
        with torch.no_grad():
            trained.append(cover(network(x)[0].coordinates, inside))
    falls = [100 * (1 - count / outside) for count, _ in trained]
    gains = [share - base for _, share in trained]
    check.require(
        "fewer active sites outside boxes than of a regular convolution, least of 3 seeds",
        min(falls), ">=", FALL, baseline=0.0, unit="%",
    )  # fmt: skip
    check.require(
        "recall of the boxes' volume above a submanifold convolution's, least of 3 seeds",
        min(gains), ">=", GAIN, baseline=base, unit="points",
    )  # fmt: skip
    check.note(
        f"sites outside boxes: submanifold {few}, regular {outside}, focal {[count for count, _ in trained]}; recall: "
        f"submanifold {base:.1f}%, regular {covered:.1f}%, focal {[round(share, 1) for _, share in trained]}%"
    )
