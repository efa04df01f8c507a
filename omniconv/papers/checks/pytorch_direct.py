"""Rows gathered from host memory are bit by bit those of the table, training on them is training as before, and lanes
that read a row from an aligned address need far fewer 128-byte requests than lanes that read it from its first element.

Requests are counted by the model of `count_requests`; no GPU takes part. The least that any order can do for a row is
the number of aligned stretches it overlaps: reading from the stretch in which it begins reaches that, the paper's
circular shift comes within one request a row of it. Widths are those of common data sets (ogbn-products 100, Reddit
602, Cora 1433) and two between. Losses are those of a GraphSAGE network on Cora, with a baseline that collects the
rows of a batch one by one.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.seeds import derive, generator
from omniconv.graphs.neighbour_sampling import adjacency, sample_neighbours
from omniconv.ops.gather_host import Order, count_requests, gather_host
from omniconv.papers.check import Check, shared_data

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8)
DRAWS = 30
WIDTHS = (100, 129, 301, 602, 1433)
ROWS, BATCH = 100_000, 2000
FEWER = 20.0
SHIFT_EXCESS = 1.0
STEPS, SEEDS = 40, (0, 1, 2)
FANOUTS = (5, 5)


def wrong_gathers() -> int:
    """Return how many gathers of random width and type differ from an index into the table in any bit."""
    random = generator(0, "gathers")
    wrong = 0
    for dtype in DTYPES:
        for _ in range(DRAWS):
            rows, width = (int(torch.randint(1, 400, (), generator=random)) for _ in range(2))
            bits = torch.randint(256, (rows, width * dtype.itemsize), generator=random, dtype=torch.uint8)
            table = bits.view(dtype)
            index = torch.randint(rows, (500,), generator=random)
            wrong += not torch.equal(gather_host(table, index).view(torch.uint8), bits[index])
    return wrong


def least(index: Tensor, width: int) -> int:
    """Return how many aligned stretches of 128 bytes rows of floats overlap."""
    first = index * width
    return int(((first + width - 1) // 32 - first // 32 + 1).sum())


class Sage(nn.Module):
    """Two layers of GraphSAGE with mean aggregation, over sampled neighbours."""

    def __init__(self, channels: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.first = nn.Linear(2 * channels, hidden)
        self.second = nn.Linear(2 * hidden, classes)

    def forward(self, seeds: Tensor, near: Tensor, far: Tensor) -> Tensor:
        """Return logits (B, classes) from features (B, C) of seeds, (B, k, C) around them, (B, 1 + k, j, C) beyond."""
        inner = torch.cat([seeds[:, None], near], 1)
        h = self.first(torch.cat([inner, far.mean(2)], -1)).relu()
        return self.second(torch.cat([h[:, 0], h[:, 1:].mean(1)], -1))


def train(seed: int, gather: Callable[[Tensor, Tensor], Tensor]) -> list[float]:
    """Return the losses of a training on Cora whose features come through `gather`."""
    with np.load(shared_data("graphs") / "planetoid-cora.npz") as file:
        data = {name: torch.from_numpy(file[name]) for name in file.files}
    nodes, channels = data["x_shape"].tolist()
    table = torch.sparse_csr_tensor(
        data["x_indptr"], data["x_indices"], data["x_data"], (nodes, channels)
    ).to_dense()
    edges = data["edges"].long().reshape(-1, 2).T
    offsets, neighbours = adjacency(torch.cat([edges, edges.flip(0)], 1), nodes)
    torch.manual_seed(derive(seed, "weights"))
    model, random = Sage(channels, 32, 7), generator(seed, "batches")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    training = data["train_mask"].nonzero()[:, 0]
    losses = []
    for _ in range(STEPS):
        seeds = training[torch.randperm(len(training), generator=random)[:64]]
        near = sample_neighbours(offsets, neighbours, seeds, FANOUTS[0], generator=random)
        inner = torch.cat([seeds[:, None], near], 1)
        far = sample_neighbours(offsets, neighbours, inner.flatten(), FANOUTS[1], generator=random)
        wanted = torch.cat([inner.flatten(), far.flatten()])
        rows = gather(table, wanted)
        middle, outer = rows.split([inner.numel(), far.numel()])
        middle, outer = (
            middle.reshape(*inner.shape, channels),
            outer.reshape(*inner.shape, FANOUTS[1], channels),
        )
        loss = F.cross_entropy(model(middle[:, 0], middle[:, 1:], outer), data["y"][seeds].long())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def collect(table: Tensor, index: Tensor) -> Tensor:
    """Gather as a loader does that fetches samples one by one."""
    return torch.stack([table[row] for row in index.tolist()])


def run(check: Check) -> None:
    """Measure the gather, the requests, and the training."""
    check.require("gathers of random width and type with a wrong bit", wrong_gathers(), "==", 0)

    index = torch.randint(ROWS, (BATCH,), generator=generator(0, "rows"))
    counts: dict[Order, list[int]] = {
        order: [count_requests(index, width, 4, order=order) for width in WIDTHS]
        for order in ("plain", "shifted", "aligned")
    }
    optimal = [least(index, width) for width in WIDTHS]
    excess = max(count - best for count, best in zip(counts["aligned"], optimal, strict=True))
    check.require(
        "requests of the aligned order beyond the least possible, most of 5 widths", excess, "==", 0
    )
    excess = max((count - best) / BATCH for count, best in zip(counts["shifted"], optimal, strict=True))
    check.require(
        "requests a row of the circular shift beyond the least possible", excess, "<=", SHIFT_EXCESS
    )
    names: dict[Order, str] = {"aligned": "aligned order", "shifted": "circular shift"}
    for order, name in names.items():
        saved = [100 * (1 - a / b) for a, b in zip(counts[order], counts["plain"], strict=True)]
        check.require(
            f"fewer requests of the {name} than of the plain order, least of 5 widths",
            min(saved), ">=", FEWER, unit="%",
        )  # fmt: skip
    check.note(f"requests of {BATCH} rows of {WIDTHS} floats: {counts}, least possible {optimal}")

    losses = [(train(seed, gather_host), train(seed, collect)) for seed in SEEDS]
    check.require(
        "steps of 3 trainings whose loss differs from the baseline loader's",
        sum(a != b for ours, baseline in losses for a, b in zip(ours, baseline, strict=True)), "==", 0,
    )  # fmt: skip
    falls = [ours[0] - ours[-1] for ours, _ in losses]
    check.require("fall of the loss in these trainings, least of 3 seeds", min(falls), ">", 0)
