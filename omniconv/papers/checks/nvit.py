"""NViT's scores foretell what the loss of a vision transformer gains when a unit of any of its five widths goes, better
than magnitudes do, and pruning by them to half the latency leaves less loss than uniform widths.

The network has four blocks of 32 features, 4 heads and 64 hidden units, trained for 20 epochs on scikit-learn's digits
at 16 x 16 pixels. Scores are means over mini-batches of 32 of the first 640 pictures; true increases are those of the
loss on the same pictures when the unit is removed. Both ways of pruning take five rounds, each with new scores and two
epochs of training; the uniform one removes the same share of each width, by the same scores. Latency is that of 256
pictures on this machine.
"""

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.compress.prune.nvit import Widths, nvit, saliency
from omniconv.compress.prune.structured import choose_units
from omniconv.core.seeds import derive
from omniconv.design.vit_latency import LatencyTable
from omniconv.models.image.vit import VisionTransformer, ViTConfig
from omniconv.papers.check import Check
from omniconv.papers.small import Split, accuracy, digits, train

ERROR = 1e-5
CORRELATION, ABOVE = 0.6, 0.1
OFF = 0.10
SEEDS = (0, 1, 2)
SHAPE = (1, 16, 16)
CONFIG = ViTConfig(32, 4, 4, 4, 16, mlp_ratio=2)
KINDS = {
    "embedding": "patch_embed.proj", "heads": "attn.qkv", "queries": "attn.queries", "values": "attn.values",
    "hidden": "mlp.fc1",
}  # fmt: skip
EPOCHS, ROUNDS, AFTER, RATIO, BATCH = 20.0, 5, 2.0, 0.5, 256
RECIPE = {"batch": 64, "shift": 1, "flip": False}


def losses(data: Split) -> list[Callable[[nn.Module], Tensor]]:
    """Return the loss of each mini-batch as a function of a model."""
    batches = zip(data[0].split(32), data[1].split(32), strict=True)
    return [lambda model, x=x, y=y: F.cross_entropy(model(x), y) for x, y in batches]


@torch.no_grad()
def loss(model: nn.Module, data: Split) -> float:
    """Return the mean loss in eval mode."""
    return float(F.cross_entropy(model.eval()(data[0]), data[1]))


def of_kind(kind: str, sizes: dict[str, int]) -> list[str]:
    """Return the widths of one kind."""
    return [name for name in sizes if name.endswith(KINDS[kind])]


@torch.no_grad()
def surgery(check: Check) -> None:
    """The pruned network beside the dense one in which the same units are masked, in float64."""
    torch.manual_seed(0)
    model = VisionTransformer(CONFIG, num_classes=10, in_chans=1).eval()
    widths = Widths(model, SHAPE)
    model.double()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.3)
    x = torch.randn(8, *SHAPE, dtype=torch.float64)
    for kind in KINDS:
        keep = {name: torch.rand(widths.sizes[name]) < 0.6 for name in of_kind(kind, widths.sizes)}
        for mask in keep.values():
            mask[0] = True
        smaller = widths.remove(model, keep)
        dense: Any = copy.deepcopy(model)
        if kind == "embedding":
            (mask,) = keep.values()
            dense = widths.structure.mask(model, keep)
            for name, module in list(dense.named_modules()):
                if isinstance(module, nn.LayerNorm):
                    owner, _, leaf = name.rpartition(".")
                    setattr(dense.get_submodule(owner), leaf, MaskedNorm(module, mask))
        for name, mask in keep.items() if kind != "embedding" else ():
            block, gone = dense.blocks[int(name.split(".")[1])], ~mask
            for parameter in (block.attn.qkv.weight, block.attn.qkv.bias):
                parts = parameter.view(3, CONFIG.num_heads, CONFIG.dim // CONFIG.num_heads, -1)
                if kind == "heads":
                    parts[:, gone] = 0
                elif kind == "queries":
                    parts[:2, :, gone] = 0
                elif kind == "values":
                    parts[2, :, gone] = 0
            if kind == "hidden":
                block.mlp.fc1.weight[gone], block.mlp.fc1.bias[gone] = 0, 0
        wanted = dense(x)
        error = float((smaller(x) - wanted).abs().max() / wanted.abs().max())
        check.require(
            f"relative error of the pruned network beside the masked one, {kind}", error, "<=", ERROR
        )


class MaskedNorm(nn.Module):
    """A layer norm over some features; the others stay zero."""

    def __init__(self, norm: nn.LayerNorm, keep: Tensor) -> None:
        super().__init__()
        self.norm, self.keep = norm, keep

    def forward(self, x: Tensor) -> Tensor:
        """Norm the features that are kept."""
        norm, keep, y = self.norm, self.keep, torch.zeros_like(x)
        y[..., keep] = F.layer_norm(
            x[..., keep], (int(keep.sum()),), norm.weight[keep], norm.bias[keep], norm.eps
        )
        return y


def correlations(model: nn.Module, data: Split) -> dict[str, tuple[float, float]]:
    """Return the rank correlations of scores and of magnitudes with the true increases, by kind and pooled."""
    from scipy import stats

    spearman: Any = stats.spearmanr

    widths = Widths(model, SHAPE)
    scores = saliency(model.eval(), widths, losses(data))
    squares = {name: p.detach().square() for name, p in model.named_parameters()}
    magnitudes = widths.sums(model, squares)
    base = loss(model, data)
    rows: dict[str, list[tuple[float, float, float]]] = {}
    for kind in KINDS:
        for name in of_kind(kind, widths.sizes):
            for unit in range(widths.sizes[name]):
                keep = torch.arange(widths.sizes[name]) != unit
                rise = loss(widths.remove(model, {name: keep}), data) - base
                rows.setdefault(kind, []).append(
                    (float(scores[name][unit]), float(magnitudes[name][unit]), rise)
                )
    rows["pooled"] = [row for kind in KINDS for row in rows[kind]]
    found = {}
    for kind, values in rows.items():
        score, magnitude, rise = zip(*values, strict=True)
        found[kind] = (float(spearman(score, rise)[0]), float(spearman(magnitude, rise)[0]))
    return found


def uniform(
    model: nn.Module,
    data: Split,
    predict: Callable[[nn.Module], float],
    finetune: Callable[[nn.Module], object],
) -> nn.Module:
    """Return a network of which the same share of every width went, in rounds, by the same scores."""
    full = predict(model)
    for number in range(1, ROUNDS + 1):
        widths = Widths(model, SHAPE)
        scores = saliency(model.eval(), widths, losses(data))
        low, high = 0.0, 0.95
        while high - low > 0.005:
            share = (low + high) / 2
            less = predict(widths.remove(model, choose_units(scores, share)))
            low, high = (low, share) if less <= full * (1 - RATIO * number / ROUNDS) else (share, high)
        model = widths.remove(model, choose_units(scores, high))
        finetune(model)
    return model


@torch.inference_mode()
def seconds(model: nn.Module) -> float:
    """Return the median seconds of a forward pass."""
    model, x, times = model.eval(), torch.randn(BATCH, *SHAPE), []
    for _ in range(30):
        start = time.perf_counter()
        model(x)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def run(check: Check) -> None:
    """Measure the surgery, the scores and the pruned networks."""
    surgery(check)
    data, test = digits(16)
    some = (data[0][:640], data[1][:640])
    ranks: dict[str, list[tuple[float, float]]] = {}
    left: dict[str, list[float]] = {}
    right: dict[str, list[float]] = {}
    off = []
    for seed in SEEDS:
        torch.manual_seed(derive(seed, "weights"))
        model = VisionTransformer(CONFIG, num_classes=10, in_chans=1)
        train(model, data, epochs=EPOCHS, seed=seed, **RECIPE)
        for kind, pair in correlations(model, some).items():
            ranks.setdefault(kind, []).append(pair)
        table = LatencyTable(model, SHAPE, batch=BATCH)

        def finetune(smaller: nn.Module, seed: int = seed) -> float:
            return train(smaller, data, epochs=AFTER, seed=100 + seed, lr=1e-3, **RECIPE)

        pruned, _ = nvit(
            model, losses(data), SHAPE, RATIO, latency=table.predict, rounds=ROUNDS, finetune=finetune
        )
        even = uniform(model, data, table.predict, finetune)
        # The machine's pace changes by the minute; the dense network tells by how much.
        pace = seconds(model) / table.predict(model)
        off.append(abs(seconds(pruned) / (table.predict(pruned) * pace) - 1))
        for name, network in (("dense", model), ("NViT", pruned), ("uniform", even)):
            left.setdefault(name, []).append(loss(network, test))
            right.setdefault(name, []).append(accuracy(network, test))
    for kind, pairs in ranks.items():
        score, magnitude = (statistics.mean(values) for values in zip(*pairs, strict=True))
        text = f"rank correlation of the score with the true increase, {kind}, mean of {len(SEEDS)} seeds"
        check.require(text, score, ">=", CORRELATION, baseline=magnitude)
        check.require(f"{text}: above that of magnitudes", score - magnitude, ">=", ABOVE, baseline=magnitude)
    check.require(
        f"loss at half the latency beside uniform widths, mean of {len(SEEDS)} seeds",
        statistics.mean(left["NViT"]), "<", statistics.mean(left["uniform"]),
        baseline=statistics.mean(left["uniform"]),
    )  # fmt: skip
    check.require(f"measured latency off the predicted one, most of {len(SEEDS)} seeds", max(off), "<=", OFF)
    check.note(f"Test losses: {left}; accuracies: {right}; latencies off: {off}")
