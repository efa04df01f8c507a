"""A 3-D CNN, an ST-GCN and a Transformer encoder, run frame by frame, give what they give for every sliding window,
at about a clip's cost divided by its length; structured pruning adapters fuse into the weights without a trace.

The networks are small and their weights random; clips hold 32 frames (tokens: 16), the stream 64. Multiply-adds are
counted as the layers run. Adapters stand in a ResNet-18 and learn for a few steps while channels are pruned.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from omniconv.compress.prune.adapters import add_adapters, fuse_adapters, prune_channels
from omniconv.core.seeds import generator
from omniconv.deploy.continual.attention import (
    RecyclingPositions,
    RetroactiveAttention,
    SingleOutputAttention,
)
from omniconv.deploy.continual.container import Residual
from omniconv.deploy.continual.network import ContinualNetwork, continual
from omniconv.deploy.continual.stgcn import STGCNBlock, skeleton_partitions
from omniconv.deploy.continual.stream import count_step_macs
from omniconv.design.cost import count_cost
from omniconv.models.factory import create_model
from omniconv.papers.check import Check

EQUAL = 1e-5
COST = 1.2
SLOPE = (1.0, 0.15)
RECOMPUTED = (2.0, 0.15)
TRAINABLE = 0.15
PRUNED = (0.5, 0.9)
RANK = 8

STREAM = 64
CLIP = 32
TOKENS = 16
WINDOWS = (512, 1024, 2048, 4096, 8192)
EMBED = 32


class Encoder(nn.Module):
    """Two encoder layers over tokens with recycled positions, and a classifier on the last token."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = RecyclingPositions(TOKENS, EMBED)
        layer = nn.TransformerEncoderLayer(EMBED, 4, 2 * EMBED, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.fc = nn.Linear(EMBED, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of tokens (N, T, E)."""
        return self.fc(self.encoder(self.positions(x))[:, -1])


def cnn() -> nn.Module:
    """Return three convolutions over time and space, one of them on a residual branch, and a classifier."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv3d(inputs, outputs, 3, padding=(0, 1, 1)), nn.BatchNorm3d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(3, 8),
        nn.MaxPool3d((1, 2, 2)),
        *block(8, 16),
        Residual(nn.Sequential(*block(16, 16))),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


def stgcn() -> nn.Module:
    """Return three blocks over a skeleton of nine joints, one of stride 2, and a classifier."""
    bones = [(0, 1), (1, 2), (2, 3), (1, 4), (4, 5), (0, 6), (6, 7), (0, 8)]
    graph = skeleton_partitions(bones, 9)
    return nn.Sequential(
        STGCNBlock(3, 8, graph, residual=False),
        STGCNBlock(8, 16, graph, stride=2),
        STGCNBlock(16, 16, graph, kernel_size=5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


def randomize(model: nn.Module) -> nn.Module:
    """Give norms statistics and weights that matter."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


@torch.no_grad()
def window_error(
    model: nn.Module, net: ContinualNetwork, x: Tensor, frames: int, axis: int
) -> tuple[float, int]:
    """Return the largest difference between the stream's outputs and those of the windows, and how many there are."""
    steps = [y for frame in x.unbind(axis) if (y := net.forward_step(frame)) is not None]
    net.reset_stream()
    worst = 0.0
    starts = range(0, x.shape[axis] - frames + 1, net.time_stride)
    for start, y in zip(starts, steps, strict=False):
        for module in model.modules():
            if isinstance(module, RecyclingPositions):
                module.start = start
        worst = max(worst, float((model(x.narrow(axis, start, frames)) - y).abs().max()))
    return worst if len(steps) >= len(starts) else math.inf, len(starts)


def slope(counts: list[float]) -> float:
    """Return the slope of counts over window lengths, both on logarithmic scales."""
    x, y = torch.tensor(WINDOWS).double().log(), torch.tensor(counts).double().log()
    x = x - x.mean()
    return float((x * y).sum() / (x * x).sum())


def _streams(check: Check) -> None:
    networks = {
        "3-D CNN": (cnn, (3, CLIP, 16, 16), 2),
        "ST-GCN": (stgcn, (3, CLIP, 9), 2),
        "2-layer Transformer encoder": (Encoder, (TOKENS, EMBED), 1),
    }
    for name, (make, shape, axis) in networks.items():
        torch.manual_seed(0)
        model = randomize(make())
        net = continual(model, shape, axis=axis)
        size = [2, *shape]
        size[axis] = STREAM
        x = torch.randn(size, generator=generator(0, name))
        worst, count = window_error(model, net, x, shape[axis - 1], axis)
        check.require(
            f"{name}: largest difference to the clip network over {count} windows", worst, "<=", EQUAL
        )
        if name == "3-D CNN":
            ideal = count_cost(model, shape).macs / CLIP
            step = count_step_macs(net, shape)
            check.require(
                "multiply-adds of a new frame over a clip's divided by its length",
                step / ideal,
                "<=",
                COST,
                baseline=CLIP,
                unit="(baseline: computing the clip again)",
            )


def _attention(check: Check) -> None:
    single, again, retroactive = [], [], []
    for frames in WINDOWS:
        layer = SingleOutputAttention(EMBED, 1, frames).eval()
        single.append(_step(layer, frames))
        again.append(count_cost(layer, (frames, EMBED)).macs)
        retroactive.append(_step(RetroactiveAttention(EMBED, 1, frames).eval(), frames))
    for name, counts, (wanted, margin) in (
        ("single-output attention", single, SLOPE),
        ("retroactive attention", retroactive, SLOPE),
        ("attention computed again", again, RECOMPUTED),
    ):
        error = abs(slope(counts) - wanted)
        check.require(
            f"{name}: distance of its cost's slope in the window from {wanted}", error, "<=", margin
        )
    check.note(
        f"Multiply-adds a token with a window of {WINDOWS[-1]}: {single[-1]:,.0f} for one output, "
        f"{retroactive[-1]:,.0f} for all, {again[-1]:,.0f} computed again."
    )


def _step(layer: SingleOutputAttention | RetroactiveAttention, frames: int) -> float:
    """Return the multiply-adds of a token, with a window filled by what its tokens would leave."""
    x = torch.randn(1, frames, EMBED)
    with torch.no_grad():
        q, k, v = layer.heads(x)
        state = {"keys": k, "values": v}
        if isinstance(layer, RetroactiveAttention):
            # One head's rows for all tokens at once would take memory of the window squared.
            rows = [layer._rows(part, k, v) for part in q.split(512, 2)]
            state |= {"queries": q} | {name: torch.cat([row[name] for row in rows], 2) for name in rows[0]}
    layer._stream = state
    counter = FlopCounterMode(display=False)
    with counter:
        layer.forward_step(torch.randn(1, EMBED))
    return counter.get_total_flops() / 2


def _adapters(check: Check) -> None:
    torch.manual_seed(0)
    model = randomize(create_model("resnet18", num_classes=10))
    x = torch.randn(8, 3, 32, 32, generator=generator(0, "pictures"))
    labels = torch.arange(8)
    for sparsity in PRUNED:
        adapted = add_adapters(model, rank=RANK)
        learned = [p for p in adapted.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(learned, 0.01)
        adapted.train()
        for step in range(1, 5):
            prune_channels(adapted, sparsity * step / 4)
            optimizer.zero_grad()
            F.cross_entropy(adapted(x), labels).backward()
            optimizer.step()
        adapted.eval()
        fused, _ = fuse_adapters(adapted)
        with torch.no_grad():
            wanted = adapted(x)
            worst = float((fused(x) - wanted).abs().max() / wanted.abs().max())
        check.require(f"fused over unfused outputs at {sparsity:.0%} of channels pruned", worst, "<=", EQUAL)
        share = sum(p.numel() for p in learned) / sum(p.numel() for p in model.parameters())
        check.require(f"trainable share of full fine-tuning at {sparsity:.0%}", share, "<", TRAINABLE)


def run(check: Check) -> None:
    """Measure the claim."""
    _streams(check)
    _attention(check)
    _adapters(check)
