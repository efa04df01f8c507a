"""A ConvFirst block computed as one tiled kernel equals its layers and moves a third of their bytes, as counted
beforehand; a waterline's area is the latency; and a model of operations, bytes and calls ranks layers on a CPU by
their time, as operations alone do not.

The fused kernel is compiled for CPUs; the paper's runs on GPUs. The latency model is fitted here to probes of every
kind, none of which is among the twelve layers that it has to rank, nor among the networks of the note. Its first
form had one set of coefficients for all pooling and one for all elementwise operators, and ranked the layers at 0.55
on a machine that was not quiet; since then every operator without products has its own, and one thread computes.
Layers and thresholds stayed.
"""

import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn

from omniconv.core.seeds import generator
from omniconv.deploy.latency import measure
from omniconv.design.cost import count_cost, layer_costs
from omniconv.design.data_reuse import rank_correlation
from omniconv.design.latency_model import fit_latency_model
from omniconv.design.waterline import (
    Block,
    Kernel,
    Machine,
    Waterline,
    block_traffic,
    efficiency_gap,
    network_waterline,
)
from omniconv.models.factory import create_model
from omniconv.models.image.convfirst import ConvFirstBlock, ConvFirstConfig
from omniconv.ops.convfirst.api import convfirst_tiled
from omniconv.papers.check import Check

EQUAL = 1e-5
COUNTED = 0.01
SHARE = 1 / 3
IDENTITY = 1e-9
RANKED = 0.8

ODD = ((64, 13, 9, (4, 5)), (24, 17, 31, (8, 16)), (16, 5, 7, (3, 3)))
STATED = ((64, 56, (28, 28)), (128, 28, (28, 28)))
NETWORKS = ("resnet18", "resnet50", "mobilenetv2_100", "convnext_tiny", "densenet121", "efficientnet_b0")
ROUNDS = 25


def layers() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Return twelve types of layers, each with the shape of its input."""
    return {
        "3x3": (nn.Conv2d(96, 96, 3, padding=1), (96, 28, 28)),
        "3x3 of stride 2": (nn.Conv2d(48, 96, 3, 2, 1), (48, 56, 56)),
        "5x5": (nn.Conv2d(48, 48, 5, padding=2), (48, 28, 28)),
        "expanding 1x1": (nn.Conv2d(96, 384, 1), (96, 28, 28)),
        "projecting 1x1": (nn.Conv2d(576, 96, 1), (576, 14, 14)),
        "depthwise 3x3": (nn.Conv2d(144, 144, 3, padding=1, groups=144), (144, 56, 56)),
        "depthwise 5x5": (nn.Conv2d(240, 240, 5, padding=2, groups=240), (240, 28, 28)),
        "groups of 8": (nn.Conv2d(96, 96, 3, padding=1, groups=12), (96, 28, 28)),
        "linear": (nn.Linear(192, 768), (196, 192)),
        "batch norm": (nn.BatchNorm2d(192), (192, 56, 56)),
        "GELU": (nn.GELU(), (384, 28, 28)),
        "max pooling": (nn.MaxPool2d(3, 2, 1), (96, 56, 56)),
    }


def make_block(channels: int) -> ConvFirstBlock:
    """Return a block in eval mode with norms that matter."""
    torch.manual_seed(channels)
    block = ConvFirstBlock(channels, ConvFirstConfig((1,), (channels,)))
    for norm in (block.norm1, block.norm2, block.norm3):
        assert norm.running_mean is not None
        nn.init.normal_(norm.running_mean, std=0.2)
        nn.init.normal_(norm.bias, std=0.2)
    return block.eval()


def _caller(module: nn.Module, x: Tensor) -> Callable[[], object]:
    def call() -> object:
        with torch.inference_mode():
            return module(x)

    return call


@torch.no_grad()
def _fusion(check: Check) -> None:
    worst = furthest = 0.0
    for channels, height, width, tile in ODD:
        block = make_block(channels)
        x = torch.randn(2, channels, height, width, generator=generator(0, "map"))
        wanted = block(x)
        y, moved = convfirst_tiled(x, block.folded(), tile=tile)
        worst = max(worst, float((y - wanted).abs().max() / wanted.abs().max()))
        predicted = 2 * block_traffic(Block(channels=channels), height, width, tile=tile)
        furthest = max(furthest, abs(4 * moved / predicted - 1))
    check.require("one kernel over its layers, odd sizes", worst, "<=", EQUAL)
    check.require("bytes that the tiles count over those predicted", furthest, "<=", COUNTED)
    for channels, size, tile in STATED:
        block, x = make_block(channels), torch.randn(1, channels, size, size)
        _, moved = convfirst_tiled(x, block.folded(), tile=tile)
        whole = block_traffic(Block(channels=channels), size, size)
        check.require(
            f"bytes of one kernel over layer by layer, {channels} x {size} x {size}",
            4 * moved / whole,
            "<=",
            SHARE,
            baseline=whole,
            unit="(baseline: bytes layer by layer)",
        )
        other = block_traffic(Block("mbconv", channels, group_width=1), size, size)
        check.note(
            f"An MBConv block of {channels} channels moves {other / whole:.2f} times as much, layer by layer."
        )
    block, x = make_block(64), torch.randn(1, 64, 56, 56).contiguous(memory_format=torch.channels_last)
    weights = block.folded()
    calls = {"layers": _caller(block, x), "tiles": lambda: convfirst_tiled(x, weights)}
    times = measure(calls, rounds=ROUNDS)
    check.note(
        f"A block of 64 channels on 56 x 56 pixels takes {times['tiles'].median:.2f} ms in compiled tiles and "
        f"{times['layers'].median:.2f} ms layer by layer in torch."
    )


def _waterline(check: Check) -> None:
    machine = Machine(2e11, 2e10)
    worst = 0.0
    for name in ("resnet50", "convnext_tiny", "convfirstnet_tiny"):
        line = network_waterline(create_model(name, device="meta"), (3, 224, 224), machine)
        total = sum(max(k.operations / machine.peak, k.bytes / machine.bandwidth) for k in line.kernels)
        worst = max(worst, abs(line.latency / total - 1))
        timed = [
            Kernel(k.name, k.operations, k.bytes, 1e-4 * (1 + i % 7)) for i, k in enumerate(line.kernels)
        ]
        measured = Waterline(tuple(timed), machine)
        worst = max(worst, abs(measured.latency / sum(k.seconds or 0 for k in timed) - 1))
        check.note(f"{name}: by the roofline of an assumed machine {line.level:.0%} of the peak is reached.")
    check.require("area of the waterline over the sum of latencies", worst, "<=", IDENTITY)


def _ranking(check: Check) -> None:
    model = fit_latency_model()
    tested = layers()
    inputs = {name: torch.randn(1, *shape) for name, (_, shape) in tested.items()}
    calls = {name: _caller(layer.eval(), inputs[name]) for name, (layer, _) in tested.items()}
    times = [value.median for value in measure(calls, rounds=ROUNDS).values()]
    predicted = [1e3 * model.predict(layer, shape) for layer, shape in tested.values()]
    operations = [sum(Kernel.of(r).operations for r in layer_costs(*pair)) for pair in tested.values()]
    ours, theirs = rank_correlation(predicted, times), rank_correlation(operations, times)
    check.require("rank correlation of predicted with measured times", ours, ">=", RANKED, baseline=theirs)
    check.require("its lead over that of operations alone", ours - theirs, ">", 0)
    for name, guess, took in zip(tested, predicted, times, strict=True):
        check.note(f"{name}: predicted {guess:.3f} ms, measured {took:.3f} ms.")

    networks = {name: create_model(name).eval() for name in NETWORKS}
    picture = torch.randn(1, 3, 224, 224)
    took = measure({name: _caller(net, picture) for name, net in networks.items()}, rounds=7, warmup=2)
    errors = {}
    for name, net in networks.items():
        guess = 1e3 * model.predict(net, (3, 224, 224))
        errors[name] = abs(guess / took[name].median - 1)
        check.note(
            f"{name}, not seen by the model: predicted {guess:.1f} ms, measured {took[name].median:.1f} ms."
        )
    check.note(f"Median error on networks not seen: {statistics.median(errors.values()):.1%}.")
    peak = max(count_cost(net, (3, 224, 224)).macs / took[name].median for name, net in networks.items())
    ideal = {name: count_cost(net, (3, 224, 224)).macs / peak for name, net in networks.items()}
    gaps = efficiency_gap({name: took[name].median for name in networks}, ideal)
    check.note(
        "Efficiency gaps, the best being one: " + ", ".join(f"{n} {gap:.2f}" for n, gap in gaps.items()) + "."
    )


def run(check: Check) -> None:
    """Measure the claim."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _fusion(check)
        _waterline(check)
        _ranking(check)
    finally:
        torch.set_num_threads(threads)
