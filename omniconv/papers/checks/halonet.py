"""Blocks that share one window of keys give exactly the attention of every query to its own window, gather keys three
times instead of hundreds, cost the same for every pixel, and build networks of the published sizes.
"""

import math
import statistics
import time

import torch
from torch import Tensor, nn

from omniconv.inspect.receptive_field import receptive_field
from omniconv.layers.attention.halo import HaloAttention, halo_windows
from omniconv.models.factory import create_model
from omniconv.papers.check import Check

GATHER_ERROR = 1e-5
STRIDE_ERROR = 1e-6
REPLICATION = 196 / 64
SHIFT_ERROR = 1e-12
PARAMETERS = {
    "halonet_h0": 5.5e6, "halonet_h1": 8.1e6, "halonet_h2": 9.4e6, "halonet_h3": 11.8e6, "halonet_h4": 19.1e6,
    "halonet_h5": 30.7e6, "halonet_h6": 43.4e6, "halonet_h7": 67.4e6,
    "halonet26t": 12.48e6, "halonet50ts": 22.73e6,
}  # fmt: skip
PARAMETERS_ERROR = 0.01
SLOPE_ERROR = 0.1
SIDES = (64, 96, 128, 192, 256)
ROUNDS = 7


def by_query(layer: HaloAttention, x: Tensor) -> Tensor:
    """Return the layer's output with keys and values gathered anew for every query."""
    heads, block, halo, stride = layer.num_heads, layer.block_size, layer.halo_size, layer.stride
    height, width = x.shape[2:]
    window = torch.arange(block + 2 * halo)
    rows, columns = (torch.arange(0, size, stride) for size in (height, width))
    # Keys of query (y, x) stand at rows down[y] and columns across[x] of the map.
    down, across = (places[:, None] // block * block - halo + window for places in (rows, columns))
    inside = ((down >= 0) & (down < height))[:, None, :, None] & ((across >= 0) & (across < width))[:, None]
    at = down.clamp(0, height - 1)[:, None, :, None], across.clamp(0, width - 1)[None, :, None, :]
    keys = torch.where(inside, layer.kv(x).unflatten(1, (heads, -1))[..., at[0], at[1]], 0)
    k, v = keys.split((layer.head_dim, keys.shape[2] - layer.head_dim), dim=2)
    q = layer.q(x).unflatten(1, (heads, -1))
    offset = block + 2 * halo - 1
    dy, dx = (window - places[:, None] % block + offset for places in (rows, columns))
    position = layer.pos_embed.height_rel[dy][:, None, :, None] + layer.pos_embed.width_rel[dx][:, None]
    logits = torch.einsum("ngdyx,ngdyxij->ngyxij", q, k) / math.sqrt(layer.head_dim)
    logits = logits + torch.einsum("ngdyx,yxijd->ngyxij", q, position)
    share = logits.flatten(-2).softmax(-1).view_as(logits)
    return torch.einsum("ngyxij,ngdyxij->ngdyx", share, v).flatten(1, 2)


def error(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


def support_error(layer: HaloAttention, size: int = 32) -> int:
    """Return for how many queries of a row the support is not the block with its halo."""
    x = torch.randn(1, layer.q.in_channels, size, size, generator=torch.Generator().manual_seed(0))
    wrong = 0
    for column in range(size):
        field = receptive_field(layer, x, unit=(17, column))
        expected = torch.zeros(size, size, dtype=torch.bool)
        top, left = (place // layer.block_size * layer.block_size for place in (17, column))
        halo, block = layer.halo_size, layer.block_size
        expected[top - halo : top + block + halo, max(0, left - halo) : left + block + halo] = True
        wrong += not torch.equal(torch.from_numpy(field.support), expected)
    return wrong


def shift_differences(layer: HaloAttention) -> dict[int, float]:
    """Return how far the layer is from commuting with shifts by a block and by a pixel, on a centred picture."""
    x = torch.zeros(1, layer.q.in_channels, 48, 48, dtype=torch.float64)
    x[:, :, 16:32, 16:32] = torch.randn(x[:, :, 16:32, 16:32].shape, dtype=torch.float64)
    y = layer(x)
    return {step: error(layer(x.roll(step, 3)), y.roll(step, 3)) for step in (layer.block_size, 1)}


def parameters(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(p.numel() for p in model.parameters())


def time_slope(layer: HaloAttention) -> float:
    """Return the slope of log time over log pixels, from medians of interleaved calls."""
    maps = {side: torch.randn(1, layer.q.in_channels, side, side) for side in SIDES}
    seconds: dict[int, list[float]] = {side: [] for side in SIDES}
    for round_ in range(ROUNDS + 2):
        for side, x in maps.items():
            calls = (max(SIDES) // side) ** 2
            start = time.perf_counter()
            for _ in range(calls):
                layer(x)
            if round_ > 1:
                seconds[side].append((time.perf_counter() - start) / calls)
    pixels = [2 * math.log(side) for side in SIDES]
    return statistics.linear_regression(
        pixels, [math.log(statistics.median(seconds[side])) for side in SIDES]
    ).slope


def run(check: Check) -> None:
    """Measure the blocked form, its reach, its copies, its time and the networks' sizes."""
    torch.manual_seed(0)
    plain = HaloAttention(16, num_heads=2)
    strided = HaloAttention(16, num_heads=2, stride=2)
    strided.load_state_dict(plain.state_dict())
    with torch.no_grad():
        x = torch.randn(2, 16, 29, 19)
        check.require(
            "relative difference from a gather for every query", error(plain(x), by_query(plain, x)),
            "<=", GATHER_ERROR,
        )  # fmt: skip
        check.require(
            "relative difference of the strided form from a gather", error(strided(x), by_query(strided, x)),
            "<=", GATHER_ERROR,
        )  # fmt: skip
        check.require(
            "relative difference of the strided form from every other pixel of the plain one",
            error(strided(x), plain(x)[:, :, ::2, ::2]), "<=", STRIDE_ERROR,
        )  # fmt: skip
    check.require("queries of a row of 32 whose support is not block and halo", support_error(plain), "==", 0)
    with torch.no_grad():
        moved = shift_differences(plain.double())
    plain.float()
    check.require("difference after a shift by a block", moved[8], "<=", SHIFT_ERROR)
    check.require("the same after a shift by a pixel", moved[1], ">", 1e-3)
    keys = torch.randn(1, 16, 64, 64)
    check.require(
        "keys in all windows over keys of the map, block 8 and halo 3", halo_windows(keys, 8, 3).numel() / keys.numel(),
        "==", REPLICATION, baseline=14.0**2,
    )  # fmt: skip

    tables = [
        parameters(layer) - parameters(layer.pos_embed)
        for layer in (HaloAttention(16, num_heads=2, block_size=b, halo_size=h) for b, h in ((4, 1), (8, 3)))
    ]
    check.require("parameters that a larger window adds beside its tables", tables[1] - tables[0], "==", 0)
    counts = {name: parameters(create_model(name, device="meta")) for name in PARAMETERS}
    worst = max(abs(counts[name] / published - 1) for name, published in PARAMETERS.items())
    check.require("largest relative error of ten networks' parameters", worst, "<=", PARAMETERS_ERROR)
    check.note(f"parameters: {counts}")

    with torch.no_grad():
        slope = time_slope(plain)
    check.require(
        "distance from 1 of the slope of log time over log pixels, 64 to 256 pixels a side", abs(slope - 1),
        "<=", SLOPE_ERROR,
    )  # fmt: skip
