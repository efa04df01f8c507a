"""Patches, a depthwise and a pointwise convolution make a network of the published size, of one resolution
throughout and a receptive field of p (1 + d (k - 1)) pixels, and with few images it learns more than a ViT on the
same patches.

Both networks of the training see CIFAR-10 averaged to 16 x 16 pixels, patches of 2 x 2, the same images, recipe and
number of updates; the ViT (width 40, depth 4, learned positions) has as many parameters but for 3%.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.seeds import derive
from omniconv.models.factory import create_model
from omniconv.papers.check import Check
from omniconv.papers.small import Split, accuracy, cifar10, train

PARAMETERS = {
    "convmixer_1536_20": 51.626e6, "convmixer_768_32": 21.110e6, "convmixer_1024_20_ks9_p14": 24.384e6,
}  # fmt: skip
PARAMETER_ERROR = 0.001
OUTPUT_ERROR = 1e-5
FIELDS = ((2, 3, 4, 64), (2, 5, 3, 64), (7, 9, 2, 150), (3, 4, 2, 33), (2, 9, 4, 40))
"""p, k, d and the size of the image; in the last row the image clips the field."""
MARGIN = 3.0
SEEDS = (0, 1, 2)
IMAGES, EPOCHS, BATCH = 4000, 1.25, 50


class TinyViT(nn.Module):
    """Vision transformer with learned positions, norms before the branches and average pooling."""

    def __init__(self, width: int = 40, depth: int = 4, patch: int = 2, patches: int = 64) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn(patches, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        # The encoder copies one layer; every block shall have weights of its own.
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=width**-0.5)
            elif isinstance(module, nn.MultiheadAttention):
                nn.init.trunc_normal_(module.in_proj_weight, std=width**-0.5)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.head(self.blocks(self.stem(x).flatten(2).mT + self.positions).mean(1))


def count(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(p.numel() for p in model.parameters())


def by_equation(state: dict[str, Tensor], x: Tensor, depth: int, patch: int) -> Tensor:
    """The network in eval mode from its state dict and the paper's equations."""

    def normed(y: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (
            state[f"{name}.{key}"][:, None, None] for key in ("running_mean", "running_var", "weight", "bias")
        )
        return (F.gelu(y) - mean) / (var + 1e-5).sqrt() * weight + bias

    x = normed(F.conv2d(x, state["stem.0.weight"], state["stem.0.bias"], patch), "stem.2")
    for block in range(depth):
        name = f"blocks.{block}"
        weight = state[f"{name}.0.fn.0.weight"]
        y = F.conv2d(x, weight, state[f"{name}.0.fn.0.bias"], padding="same", groups=len(weight))
        x = x + normed(y, f"{name}.0.fn.2")
        x = normed(F.conv2d(x, state[f"{name}.1.weight"], state[f"{name}.1.bias"]), f"{name}.3")
    return x.mean((2, 3)) @ state["head.weight"].T + state["head.bias"]


def output_error() -> float:
    """Return the largest difference from the equations, relative to the largest logit."""
    torch.manual_seed(0)
    model = create_model("convmixer_1024_20_ks9_p14", width=64, depth=6, num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    x = torch.randn(4, 3, 84, 112)
    with torch.no_grad():
        model(x)
        expected = by_equation(model.eval().state_dict(), x, 6, 14)
        return float((model(x) - expected).abs().max() / expected.abs().max())


def shapes_kept() -> int:
    """Return how many of 20 blocks put out (h, H / p, W / p)."""
    model = create_model("convmixer_1536_20", device="meta").eval()
    shapes: list[tuple[int, ...]] = []
    for block in model.get_submodule("blocks").children():
        block.register_forward_hook(lambda m, x, y: shapes.append(tuple(y.shape)))
    model(torch.empty(1, 3, 224, 161, device="meta"))
    return shapes.count((1, 1536, 32, 23))


def field(patch: int, kernel: int, depth: int, size: int) -> int:
    """Return over how many columns the gradient of the middle of the last map is not zero."""
    torch.manual_seed(0)
    model = create_model(
        "convmixer_test", width=4, depth=depth, kernel_size=kernel, patch_size=patch
    ).double()
    x = torch.randn(1, 3, size, size, dtype=torch.float64, requires_grad=True)
    features = model.eval().forward_features(x)
    middle = features.shape[3] // 2
    (gradient,) = torch.autograd.grad(features[0, :, middle, middle].sum(), x)
    return int((gradient.abs().amax((0, 1, 2)) > 0).sum())


def make_network(name: str, seed: int) -> nn.Module:
    """Return one of the two networks of the training."""
    torch.manual_seed(derive(seed, "weights"))
    if name == "vit":
        return TinyViT()
    model = create_model(
        "convmixer_256_8_cifar", width=128, depth=4, kernel_size=5, patch_size=2, num_classes=10
    )
    return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def small_pictures() -> tuple[Split, Split]:
    """Return CIFAR-10 at 16 x 16 pixels."""
    (x, y), (tx, ty) = cifar10(IMAGES, 2000)
    return (F.avg_pool2d(x, 2), y), (F.avg_pool2d(tx, 2), ty)


def run(check: Check) -> None:
    """Measure counts, form, field, and a small training."""
    for name, parameters in PARAMETERS.items():
        error = abs(count(create_model(name, device="meta")) / parameters - 1)
        check.require(f"{name}: parameters off the published ones by", error, "<=", PARAMETER_ERROR)
    check.require(
        "difference of the logits from the paper's equations, relative", output_error(), "<=", OUTPUT_ERROR
    )
    check.require("blocks of 1536/20 that put out (h, H / p, W / p)", shapes_kept(), "==", 20)
    right = sum(field(p, k, d, size) == min(size, p * (1 + d * (k - 1))) for p, k, d, size in FIELDS)
    check.require("receptive fields of p (1 + d (k - 1)) pixels, or the image", right, "==", len(FIELDS))

    training, test = small_pictures()
    scores: dict[str, list[float]] = {"convmixer": [], "vit": []}
    for seed in SEEDS:
        for name in scores:
            model = make_network(name, seed)
            train(model, training, epochs=EPOCHS, batch=BATCH, seed=seed, shift=1)
            scores[name].append(accuracy(model, test))
    means = {name: sum(values) / len(values) for name, values in scores.items()}
    check.require(
        "accuracy minus a ViT's on the same patches, CIFAR-10, mean of 3 seeds",
        means["convmixer"] - means["vit"], ">=", MARGIN, baseline=means["vit"], unit="points",
    )  # fmt: skip
    sizes = {name: count(make_network(name, 0)) for name in scores}
    check.note(f"accuracies {scores}, parameters {sizes}")
