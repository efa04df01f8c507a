"""Attention averages: it takes high frequencies and variance out of feature maps where convolution puts them in, and a
network with both does not lose to convolutions alone.

The trained networks see CIFAR-10 averaged to 16 x 16 pixels. The AlterNet has eight blocks, three of them attention;
its rival is the same network with convolutions only; the vision transformer has four blocks on 8 x 8 patches and no
class token. A block's change is that from its input to its output, shortcut included.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from omniconv.core.seeds import derive, generator
from omniconv.inspect.curvature import hessian_eigenvalues
from omniconv.inspect.lesion import lesion_study
from omniconv.inspect.spectra import feature_spectra
from omniconv.layers.attention.window import WindowAttention
from omniconv.models.factory import create_model
from omniconv.models.image.alternet import AttentionBlock, ConvBlock
from omniconv.models.image.vit import Block
from omniconv.papers.check import Check
from omniconv.papers.small import accuracy, cifar10, train

MEAN_ERROR = 1e-6
DRAWS = 200
EIGENVALUE_ERROR = 0.01
FALLING = 0.8
VARIANCE = 0.7
MARGIN = -0.5
SEEDS = (0, 1, 2)
IMAGES, TEST_IMAGES, EPOCHS = 4000, 1000, 2


def mean_error() -> float:
    """Return how far attention with constant logits is from the mean over its window."""
    torch.manual_seed(0)
    layer = WindowAttention(8, num_heads=2, window_size=4).double()
    for parameter in (layer.q.weight, layer.q.bias, layer.bias):
        nn.init.zeros_(parameter)  # type: ignore[arg-type]
    x = torch.randn(2, 8, 12, 8, dtype=torch.float64)
    with torch.no_grad():
        means = F.avg_pool2d(layer.kv(x).chunk(2, 1)[1], 4)
        expected = layer.proj(means.repeat_interleave(4, 2).repeat_interleave(4, 3))
        return float((layer(x) - expected).abs().max())


def widened() -> int:
    """Return how many random row-stochastic matrices make the range of a random map larger."""
    random = generator(0, "stochastic")
    wider = 0
    for _ in range(DRAWS):
        values = torch.randn(30, 5, generator=random, dtype=torch.float64)
        share = (torch.randn(30, 30, generator=random, dtype=torch.float64) * 3).softmax(-1)
        mixed = share @ values
        wider += bool(((mixed.amax(0) - mixed.amin(0)) > (values.amax(0) - values.amin(0)) + 1e-12).any())
    return wider


def eigenvalue_error() -> float:
    """Return the relative error of power iteration against the whole Hessian of 314 parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 10)).double()
    batch = torch.randn(40, 8, dtype=torch.float64), torch.randint(10, (40,))

    def loss(model: nn.Module) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    values = OrderedDict((name, p.detach()) for name, p in model.named_parameters())

    def of_flat(flat: Tensor) -> Tensor:
        parts = flat.split([v.numel() for v in values.values()])
        weights = {name: part.view_as(v) for (name, v), part in zip(values.items(), parts, strict=True)}
        return F.cross_entropy(functional_call(model, weights, (batch[0],)), batch[1])

    flat = torch.cat([v.flatten() for v in values.values()])
    whole = torch.linalg.eigvalsh(torch.autograd.functional.hessian(of_flat, flat))
    expected = float(whole[whole.abs().argmax()])
    found = float(hessian_eigenvalues(model, [loss]).data["eigenvalue"][0, 0])
    return abs(found / expected - 1)


def make_network(kind: str, seed: int) -> nn.Module:
    """Return the AlterNet, its rival of convolutions, or the vision transformer."""
    torch.manual_seed(derive(seed, "weights"))
    if kind == "vit":
        return create_model(
            "vit_test", num_classes=10, dim=48, depth=4, num_heads=4, patch_size=2, img_size=16, drop_path_rate=0.0
        )  # fmt: skip
    return create_model(
        "alternet_test", num_classes=10, depths=(2, 2, 4), attention=(0, 1, 2) if kind == "alternet" else (0, 0, 0),
        num_heads=(1, 2, 4), widths=(12, 24, 48), bottleneck=False, stem="3x3", head_dim=12, window_size=4,
        drop_path_rate=0.0,
    )  # fmt: skip


@torch.no_grad()
def changes(model: nn.Module, images: Tensor) -> dict[str, list[tuple[float, float]]]:
    """Return by how much every block that keeps the map's shape changes high frequencies and variance, by kind.

    The first is a difference of log amplitudes at frequency pi, the second a ratio less one.
    """
    found: dict[str, list[tuple[float, float]]] = {"attention": [], "convolution": []}

    def compare(kind: str, before: Tensor, after: Tensor) -> None:
        if before.ndim == 3:
            side = int(before.shape[1] ** 0.5)
            before, after = (one.transpose(1, 2).unflatten(2, (side, side)) for one in (before, after))
        if before.shape == after.shape:
            spectra = feature_spectra({"before": before, "after": after})
            variance = spectra.data["variance"]
            found[kind].append(
                (float(spectra.high[1] - spectra.high[0]), float(variance[1] / variance[0] - 1))
            )

    handles = []
    for module in model.modules():
        if isinstance(module, AttentionBlock | ConvBlock):

            def around(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
                compare(
                    "attention" if isinstance(module, AttentionBlock) else "convolution", inputs[0], output
                )

            handles.append(module.register_forward_hook(around))
        elif isinstance(module, Block):
            # Of a transformer's block, what comes before its attention and what comes before its MLP.
            seen: list[Tensor] = []

            def before(module: nn.Module, inputs: tuple[Tensor], seen: list[Tensor] = seen) -> None:
                seen.append(inputs[0])

            def after(module: nn.Module, inputs: tuple[Tensor], seen: list[Tensor] = seen) -> None:
                compare("attention", seen.pop(), inputs[0])

            handles.append(module.norm1.register_forward_pre_hook(before))
            handles.append(module.norm2.register_forward_pre_hook(after))
    model.eval()(images)
    for handle in handles:
        handle.remove()
    return found


def run(check: Check) -> None:
    """Measure averages, curvature, what blocks do to frequencies and variance, and accuracy."""
    check.require("difference of constant logits from the window's mean", mean_error(), "<=", MEAN_ERROR)
    check.require(f"stochastic matrices among {DRAWS} that widen a map's range", widened(), "==", 0)
    check.require(
        "relative error of the largest Hessian eigenvalue, 314 parameters", eigenvalue_error(), "<=",
        EIGENVALUE_ERROR,
    )  # fmt: skip

    training, test = ((F.avg_pool2d(x, 2), y) for x, y in cifar10(IMAGES, TEST_IMAGES))
    scores: dict[str, list[float]] = {"alternet": [], "cnn": [], "vit": []}
    blocks: dict[str, list[tuple[float, float]]] = {"attention": [], "convolution": []}
    for seed in SEEDS:
        for kind, found in scores.items():
            model = make_network(kind, seed)
            train(model, training, epochs=EPOCHS, seed=seed, shift=1)
            found.append(accuracy(model, test))
            if kind != "cnn":
                for name, pairs in changes(model, test[0][:256]).items():
                    blocks[name] += pairs
            if kind == "alternet" and seed == SEEDS[0]:
                names = ["layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer3.2", "layer3.3"]
                missed = lesion_study(model, names, lambda m: accuracy(m, test)).loss
                check.note(
                    f"points lost without a block: {dict(zip(names, missed.round(1).tolist(), strict=True))}"
                )

    high, variance = (
        {kind: [pair[index] for pair in pairs] for kind, pairs in blocks.items()} for index in (0, 1)
    )
    falling = sum(change < 0 for change in high["attention"]) / len(high["attention"])
    check.require(
        "share of attention blocks that lower the log amplitude at frequency pi", falling, ">=", FALLING
    )
    means = {kind: sum(values) / len(values) for kind, values in high.items()}
    check.require(
        "mean change of that amplitude by convolution minus that by attention",
        means["convolution"] - means["attention"], ">", 0, baseline=means["attention"],
    )  # fmt: skip
    right = sum(change < 0 for change in variance["attention"]) + sum(c > 0 for c in variance["convolution"])
    check.require(
        "share of blocks that change the variance as the paper says",
        right / sum(map(len, variance.values())), ">=", VARIANCE,
    )  # fmt: skip
    mean = {kind: sum(found) / len(found) for kind, found in scores.items()}
    check.require(
        "accuracy of the AlterNet minus that of its convolutions, mean of 3 seeds",
        mean["alternet"] - mean["cnn"], ">=", MARGIN, baseline=mean["cnn"], unit="points",
    )  # fmt: skip
    check.note(f"accuracies: {scores}")
    for name, values in (("log amplitude at pi", high), ("variance, relative", variance)):
        rounded = {kind: [round(value, 3) for value in changes] for kind, changes in values.items()}
        check.note(f"changes of {name}: {rounded}")
