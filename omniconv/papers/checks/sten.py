"""Layouts, operators and sparsifiers registered apart give what masked dense tensors give, in calls, in a network and
in its training; grouped n:m keeps less than n:m and more than blocks, and multiplies faster than dense.

The small network has one layer in each of three layouts; its twin keeps dense weights and masks them by hand.
"""

import inspect
import itertools
import logging
import statistics
import time
from dataclasses import dataclass
from logging.handlers import BufferingHandler
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.ops.sparse import (
    Format,
    Layout,
    register_operator,
    register_sparsifier,
    sparsify,
    sparsify_model,
)
from omniconv.ops.sparse.layouts import COO, CSR, NM, Block, GroupedNM, Masked
from omniconv.ops.sparse.sparsifiers import BlockFraction, GroupedNOfM, NOfM, ScalarFraction
from omniconv.papers.check import Check

ERROR = 1e-5
GRADIENT_ERROR = 1e-6
STEPS = 200
LINES = 30
GROUP = 4
PATTERNS = ((2, 4), (1, 10))
SIZE = 1024
FASTER = 1.5
ROUNDS = 7
LAYOUTS = {
    Masked: ScalarFraction(0.5), COO: ScalarFraction(0.6), CSR: ScalarFraction(0.7), NM: NOfM(2, 4),
    Block: BlockFraction(0.5, (2, 3)), GroupedNM: GroupedNOfM(2, 4, 2),
}  # fmt: skip


def whole(x: Tensor | Layout) -> Tensor:
    """Return a tensor."""
    return x.dense() if isinstance(x, Layout) else x


def pair_error() -> float:
    """Return the largest relative error of products, convolutions and sums of any two layouts."""
    torch.manual_seed(0)
    worst = 0.0
    for first, second in itertools.product(LAYOUTS, (*LAYOUTS, Tensor)):

        def draw(layout: type, *shape: int):
            return (
                torch.randn(shape)
                if layout is Tensor
                else sparsify(torch.randn(shape), LAYOUTS[layout], layout)
            )

        for op, a, b in (
            (torch.matmul, draw(first, 14, 23), draw(second, 23, 9)),
            (torch.add, draw(first, 14, 23), draw(second, 14, 23)),
            (F.conv2d, draw(second, 2, 3, 9, 7), draw(first, 6, 3, 3, 2)),
        ):
            exact = op(whole(a), whole(b))
            worst = max(worst, float((op(a, b) - exact).abs().max() / exact.abs().max()))
    return worst


def user_layout() -> type[Layout]:
    """Return a layout of one's own with its sparsifier and one operator."""

    @dataclass(frozen=True, eq=False)
    class Rows(Layout):
        values: Tensor
        rows: Tensor
        shape: torch.Size

        def dense(self):
            return self.values.new_zeros(self.shape).index_copy(0, self.rows, self.values)

        def take(self, dense):
            return dense[self.rows]

    @register_sparsifier(ScalarFraction, Rows)
    def keep(sparsifier, dense):
        count = round((1 - sparsifier.fraction) * len(dense))
        rows = dense.norm(dim=1).topk(count).indices
        return Rows(dense[rows], rows, dense.shape)

    @register_operator(torch.matmul, (Rows,))
    def multiply(a, b):
        return b.new_zeros(a.shape[0], b.shape[1]).index_copy(0, a.rows, a.values @ b)

    return Rows


def warnings_of(call, times: int) -> int:
    """Return how many warnings calling something several times logs."""
    handler = BufferingHandler(capacity=1000)
    logger = logging.getLogger("omniconv")
    logger.addHandler(handler)
    propagate, logger.propagate = logger.propagate, False
    try:
        for _ in range(times):
            call()
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
    return len(handler.buffer)


def training_errors() -> tuple[float, float, int]:
    """Return errors of the first output and of gradients over the steps, and how many zeros moved."""
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(192, 5)
    ).double()  # fmt: skip
    formats = {
        "0.weight": Format(external=ScalarFraction(0.5), layout=COO),
        "2.weight": Format(external=GroupedNOfM(2, 4, 1), layout=GroupedNM),
        "5.weight": Format(external=BlockFraction(0.5, (1, 4)), layout=Block),
    }
    sparse = sparsify_model(plain, formats)
    layers: dict[str, Any] = {name: sparse.get_submodule(name.split(".")[0]) for name in formats}
    masks = {name: layer.weight.mask for name, layer in layers.items()}
    for name, mask in masks.items():
        plain.get_parameter(name).data.mul_(mask)
    models = (plain, sparse)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=3e-3) for model in models]
    forward = gradient = 0.0
    for step in range(STEPS):
        x, labels = torch.randn(16, 2, 6, 6, dtype=torch.float64), torch.randint(5, (16,))
        outputs = [model(x) for model in models]
        if step == 0:
            forward = float((outputs[0] - outputs[1]).detach().abs().max())
        for output, optimizer in zip(outputs, optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(output, labels).backward()
        for name, mask in masks.items():
            weight: Any = plain.get_parameter(name)
            wanted = weight.grad.mul_(mask)
            found = (
                layers[name].weight.with_values(layers[name].parametrizations.weight.original.grad).dense()
            )
            gradient = max(gradient, float((found - wanted).abs().max()))
        for optimizer in optimizers:
            optimizer.step()
    moved = sum(int((layers[name].weight.dense()[~mask] != 0).sum()) for name, mask in masks.items())
    return forward, gradient, moved


def energies(n: int, m: int) -> list[float]:
    """Return the share of the sum of magnitudes kept: unstructured, n:m, grouped n:m, blocks of as many as a group."""
    torch.manual_seed(0)
    dense = torch.randn(480, 480)
    fraction = 1 - n / m
    sparsifiers = (
        ScalarFraction(fraction),
        NOfM(n, m),
        GroupedNOfM(n, m, GROUP),
        BlockFraction(fraction, (GROUP, 1)),
    )
    return [float((dense * s.mask(dense)).abs().sum() / dense.abs().sum()) for s in sparsifiers]


def speedup() -> tuple[float, float]:
    """Return how many times as fast as dense the compiled product is at 90% zeros, and the dense seconds."""
    torch.manual_seed(0)
    a, b = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE)
    sparse = sparsify(a, GroupedNOfM(1, 10, GROUP), GroupedNM)
    seconds: tuple[list[float], list[float]] = ([], [])
    for round in range(ROUNDS + 1):
        started = time.perf_counter()
        torch.matmul(a, b)
        between = time.perf_counter()
        torch.matmul(sparse, b)
        if round:
            seconds[0].append(between - started)
            seconds[1].append(time.perf_counter() - between)
    dense = statistics.median(seconds[0])
    return dense / statistics.median(seconds[1]), dense


def run(check: Check) -> None:
    """Measure calls, the fallback, a network, what layouts keep, and the compiled product."""
    errors: list[float] = []
    fallbacks = warnings_of(lambda: errors.append(pair_error()), 1)
    check.require("relative error of matmul, add and conv of any two layouts", errors[0], "<=", ERROR)
    again = warnings_of(pair_error, 1)
    check.require("warnings of fallbacks to dense the second time", again, "==", 0, baseline=fallbacks)

    rows = user_layout()
    lines = len(inspect.getsource(user_layout).splitlines())
    check.require("lines of a layout of one's own with one operator", lines, "<=", LINES)
    a, b = sparsify(torch.randn(9, 5), ScalarFraction(0.5), rows), torch.randn(5, 4)
    check.require("warnings of its registered product", warnings_of(lambda: a @ b, 3), "==", 0)
    check.require(
        "warnings of a sum that nobody registered, three times", warnings_of(lambda: a + a, 3), "==", 1
    )
    check.require("error of both", float(max((a @ b - a.dense() @ b).abs().max(),
        (a + a - 2 * a.dense()).abs().max())), "<=", ERROR)  # fmt: skip

    forward, gradient, moved = training_errors()
    check.require("difference of a rewritten network from the masked one", forward, "<=", GRADIENT_ERROR)
    check.require("the same of gradients over 200 steps", gradient, "<=", GRADIENT_ERROR)
    check.require("zeros that are none after 200 steps", moved, "==", 0)

    for n, m in PATTERNS:
        mask = GroupedNOfM(n, m, GROUP).mask(torch.randn(480, 480))
        wrong = int((mask.unflatten(1, (-1, m)).sum(2) != n).sum())
        check.require(f"blocks of grouped {n}:{m} without exactly {n} entries", wrong, "==", 0)
        kept = energies(n, m)
        for (better, more), (worse, less) in itertools.pairwise(
            zip(("unstructured", "n:m", "grouped n:m", "blocked"), kept, strict=True)
        ):
            claim = f"share of magnitude kept at {n}:{m}: {better} over {worse}"
            check.require(claim, more, ">=", less, baseline=less)

    ratio, dense = speedup()
    check.require("times as fast as dense, 1024 x 1024 x 1024 at 90% zeros", ratio, ">=", FASTER)
    check.note(f"the dense product ran at {2 * SIZE**3 / dense / 1e9:.0f} GFLOP/s")
