"""Space-to-depth and an ordinary convolution downsample without losing a pixel, take the place of every strided
convolution and pool of a network, and find small objects that strided convolutions miss.

The detector sees 48 x 48 pictures of noise, with rings of 6 pixels to find and crosses of as many bright pixels to
leave alone, and puts out a map of 12 x 12. It is trained with strides and with space-to-depth at equal channels, steps
and seeds. An object counts as found if one of the picture's three highest peaks is in its cell or one beside it.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.seeds import derive, generator
from omniconv.layers.conv.spd import SPDConv2d, replace_strides
from omniconv.models.factory import create_model
from omniconv.papers.check import Check

EXACT = 1e-5
DISCARDED = 0.75  # by a 1x1 convolution of stride 2
GAIN = 3.0
SEEDS = (0, 1, 2)
OBJECTS, STEPS, BATCH, RATE = 3, 400, 32, 5e-3

RING = F.pad(torch.zeros(4, 4), (1, 1, 1, 1), value=1.0)
CROSS = torch.zeros(6, 6)
CROSS[2:4] = CROSS[:, 2:4] = 1.0


def order_error() -> float:
    """Return the difference of the layer from the paper's slices, one sub-map after the other, with their kernel."""
    torch.manual_seed(0)
    layer = SPDConv2d(3, 4)
    x = torch.randn(2, 3, 10, 8)
    slices = torch.cat([x[..., row::2, column::2] for column in range(2) for row in range(2)], 1)
    order = [c * 4 + row * 2 + column for column in range(2) for row in range(2) for c in range(3)]
    with torch.no_grad():
        return float((layer(x) - F.conv2d(slices, layer.weight[:, order], layer.bias, padding=1)).abs().max())


@torch.no_grad()
def kernel_errors() -> tuple[float, float]:
    """Return how far the layer is from a 6x6 convolution of stride 2, and embedded 3x3 ones of stride 2 from theirs."""
    torch.manual_seed(0)
    layer, x = SPDConv2d(8, 6), torch.randn(2, 8, 12, 10)
    wide = F.conv2d(x, F.pixel_shuffle(layer.weight, 2), layer.bias, stride=2, padding=2)
    strided = nn.Conv2d(8, 6, 3, 2, 1)
    embedded = SPDConv2d.from_strided(strided)
    return float((layer(x) - wide).abs().max()), float((embedded(x) - strided(x)).abs().max())


def unseen(layer: nn.Module) -> float:
    """Return the share of pixels on which no output depends."""
    x = torch.randn(1, 4, 8, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x)
    return float((gradient == 0).double().mean())


def conv(in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Return convolution, batch norm and SiLU."""
    padding = (kernel - stride + 1) // 2 if kernel % 2 == 0 else kernel // 2
    layer = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(out_channels), nn.SiLU(inplace=True))


class YoloLike(nn.Module):
    """The skeleton of YOLOv5: five strided convolutions down, two up-samplings, two strided convolutions down again."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        w = width
        self.fine = nn.Sequential(conv(3, w, 6, 2), conv(w, w, 3, 2), conv(w, w, 3, 2), conv(w, w))
        self.middle = nn.Sequential(conv(w, w, 3, 2), conv(w, w))
        self.coarse = nn.Sequential(conv(w, w, 3, 2), nn.MaxPool2d(5, 1, 2), conv(w, w, 1))
        self.up = nn.Upsample(scale_factor=2)
        self.top_middle, self.top_fine = conv(2 * w, w), conv(2 * w, w)
        self.down_middle, self.down_coarse = conv(w, w, 3, 2), conv(w, w, 3, 2)
        self.heads = nn.ModuleList(nn.Conv2d(channels, 18, 1) for channels in (w, 2 * w, 2 * w))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the maps of three resolutions."""
        fine = self.fine(x)
        middle = self.middle(fine)
        coarse = self.coarse(middle)
        middle = self.top_middle(torch.cat([self.up(coarse), middle], 1))
        fine = self.top_fine(torch.cat([self.up(middle), fine], 1))
        second = torch.cat([self.down_middle(fine), middle], 1)
        third = torch.cat([self.down_coarse(middle), coarse], 1)
        return [head(y) for head, y in zip(self.heads, (fine, second, third), strict=True)]


def strided(model: nn.Module) -> int:
    """Return how many convolutions and pools of the model have a stride."""
    kinds = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
    return sum(isinstance(m, kinds) and m.stride not in (1, (1, 1)) for m in model.modules())


@torch.no_grad()
def shapes(model: nn.Module, x: Tensor) -> list[tuple[int, ...]]:
    """Return the shapes of all outputs."""
    outputs = model.eval()(x)
    return [tuple(y.shape) for y in (outputs if isinstance(outputs, list) else [outputs])]


def pictures(count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return pictures (N, 1, 48, 48) and maps (N, 12, 12) that are 1 in the cells of the rings' centres."""
    images = torch.randn(count, 1, 48, 48, generator=random)
    targets = torch.zeros(count, 12, 12)
    for index in range(count):
        # Of 16 tiles of 12 pixels, three hold a ring and three a cross, none at the same place.
        tiles = torch.randperm(16, generator=random)[: 2 * OBJECTS].tolist()
        offsets = torch.randint(7, (2 * OBJECTS, 2), generator=random).tolist()
        for position, (tile, (dy, dx)) in enumerate(zip(tiles, offsets, strict=True)):
            y, x = tile // 4 * 12 + dy, tile % 4 * 12 + dx
            images[index, 0, y : y + 6, x : x + 6] += RING if position < OBJECTS else CROSS
            if position < OBJECTS:
                targets[index, (y + 3) // 4, (x + 3) // 4] = 1
    return images, targets


def make_detector(seed: int, *, spd: bool, width: int = 8) -> nn.Module:
    """Return a detector of two downsamplings by two, with space-to-depth or strides."""
    torch.manual_seed(derive(seed, "weights"))

    def down(in_channels: int, out_channels: int) -> nn.Module:
        if spd:
            return SPDConv2d(in_channels, out_channels, bias=False)
        return nn.Conv2d(in_channels, out_channels, 3, 2, 1, bias=False)

    return nn.Sequential(
        down(1, width), nn.BatchNorm2d(width), nn.ReLU(),
        down(width, 2 * width), nn.BatchNorm2d(2 * width), nn.ReLU(),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU(),
        nn.Conv2d(2 * width, 1, 1), nn.Flatten(1, 2),
    )  # fmt: skip


@torch.no_grad()
def recall(model: nn.Module, images: Tensor, targets: Tensor) -> float:
    """Return the share of rings that the three highest peaks of their picture find, in percent."""
    heat = model.eval()(images)
    peaks = torch.where(F.max_pool2d(heat, 3, 1, 1) == heat, heat, -torch.inf).flatten(1)
    chosen = torch.zeros_like(peaks).scatter_(1, peaks.topk(OBJECTS).indices, 1).unflatten(1, (12, 12))
    near = F.max_pool2d(chosen[:, None], 3, 1, 1)[:, 0]
    return float(100 * (near * targets).sum() / targets.sum())


def run(check: Check) -> None:
    """Measure the rearrangement, its kernels, the converter, and recall of small objects."""
    x = torch.randn(2, 3, 12, 10)
    restored = F.pixel_shuffle(F.pixel_unshuffle(x, 2), 2)
    check.require(
        "values that the inverse rearrangement restores wrongly", int((restored != x).sum()), "==", 0
    )
    check.require(
        "difference from the paper's slices, in their order of channels", order_error(), "<=", EXACT
    )
    wide, embedded = kernel_errors()
    check.require("difference from a 6x6 convolution of stride 2", wide, "<=", EXACT)
    check.require("difference of embedded 3x3 convolutions of stride 2", embedded, "<=", EXACT)
    check.require(
        "share of values that a 1x1 convolution of stride 2 discards",
        unseen(nn.Conv2d(4, 8, 1, 2)),
        "==",
        DISCARDED,
    )
    check.require("the same of space-to-depth and a 1x1 convolution", unseen(SPDConv2d(4, 8, 1)), "==", 0)

    x = torch.randn(2, 3, 64, 96)
    models = {
        "ResNet-18": create_model("resnet18", num_classes=10, features_only=True),
        "a YOLO-like net": YoloLike(),
    }
    for name, model in models.items():
        converted = replace_strides(model, x)
        count = sum(isinstance(m, SPDConv2d) for m in converted.modules())
        check.require(f"strided layers replaced in {name}", count, "==", strided(model))
        check.require(f"strided layers left in {name}", strided(converted), "==", 0)
        check.require(f"shapes kept in {name}", shapes(converted, x) == shapes(model, x), "==", True)

    scores: dict[bool, list[float]] = {True: [], False: []}
    test = pictures(1000, generator(0, "test"))
    for seed in SEEDS:
        for spd in scores:
            model, random = make_detector(seed, spd=spd), generator(seed, "train")
            optimizer = torch.optim.Adam(model.parameters(), RATE)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
            for _ in range(STEPS):
                images, targets = pictures(BATCH, random)
                loss = F.binary_cross_entropy_with_logits(model(images), targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            scores[spd].append(recall(model, *test))
    means = {spd: sum(values) / len(values) for spd, values in scores.items()}
    check.require(
        "recall of 6-pixel rings with space-to-depth minus with strides, mean of 3 seeds",
        means[True] - means[False], ">=", GAIN, baseline=means[False], unit="points",
    )  # fmt: skip
    check.note(f"recall with space-to-depth {scores[True]}, with strides {scores[False]}")
