"""One layer of attention on patches computes any convolution, with (2 ceil((K - 1) / 2P) + 1)^2 heads and no fewer, and
a transformer that starts from trained convolutions learns from few images what one from random weights does not.

The small training sees 500 images of Fashion-MNIST. The transformer's layers are convolutions for the first half of the
steps and attention, converted, for the second; the baseline, the same transformer from random weights, has all steps.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.seeds import derive
from omniconv.inspect.theory.vit_conv import (
    TokenConv2d,
    attention_from_conv,
    conv_blocks,
    convs_to_attention,
    heads_needed,
)
from omniconv.layers.attention.patch_attention import PatchAttention
from omniconv.papers.check import Check
from omniconv.papers.small import accuracy, fashion_mnist, train

SIZES = [(kernel, patch) for kernel in (3, 5, 7) for patch in (2, 4, 8)]
ERROR = 1e-4
LEAK = 1e-6
RESIDUAL = 1e-2
GAIN = 3.0
SEEDS = (0, 1, 2)
IMAGES, STEPS, BATCH = 500, 120, 50
PATCH, CHANNELS, KERNEL, GRID = 2, 8, 3, (7, 7)
TRAINING_LEAK = 0.01


@torch.no_grad()
def layer_error(kernel: int, patch: int, channels: int) -> tuple[float, float, int]:
    """Return the largest difference from the convolution, the largest leak of a head, and the number of heads."""
    torch.manual_seed(100 * kernel + 10 * patch + channels)
    conv = nn.Conv2d(channels, 4 - channels, kernel, padding=kernel // 2)
    images = torch.randn(2, channels, 4 * patch, 3 * patch)
    layer = attention_from_conv(TokenConv2d(conv, patch), (4, 3), leak=LEAK)
    tokens = F.pixel_unshuffle(images, patch).permute(0, 2, 3, 1)
    y = F.pixel_shuffle(layer(tokens).permute(0, 3, 1, 2), patch)
    attention = layer.position_scores(4, 3).double().softmax(-1)
    leak = float((1 - attention.amax(-1)).max())
    return float((y - conv(images)).abs().max()), leak, layer.num_heads


def residuals(kernel: int, patch: int) -> tuple[float, float]:
    """Return what the best values leave unexplained with one head fewer, relative to the convolution.

    First with the heads that look at one patch each, least squares without the least important one. Then a bound for
    any attention that depends on positions: the heads' matrices span as many dimensions as there are heads, and the
    best such subspace leaves the smallest singular value of the blocks.
    """
    torch.manual_seed(kernel)
    blocks = conv_blocks(torch.randn(3, 3, kernel, kernel, dtype=torch.float64), patch).flatten(1)
    total = blocks.norm()
    return float(blocks.norm(dim=1).min() / total), float(torch.linalg.svdvals(blocks)[-1] / total)


class Residual(nn.Module):
    """A layer on a residual branch, after a layer norm."""

    def __init__(self, dim: int, layer: nn.Module) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(dim), layer

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum."""
        return x + self.layer(self.norm(x))


class PatchNetwork(nn.Module):
    """Two blocks of a token mixer and an MLP on a 7 x 7 map of tokens, which hold 2 x 2 pixels of 8 channels."""

    def __init__(self, seed: int, *, attention: bool) -> None:
        super().__init__()
        torch.manual_seed(derive(seed, "weights"))
        dim = CHANNELS * PATCH**2
        self.embed = nn.Conv2d(1, dim, 4, 4)
        self.blocks = nn.Sequential()
        for _ in range(2):
            mixer: nn.Module = TokenConv2d(nn.Conv2d(CHANNELS, CHANNELS, KERNEL, padding=KERNEL // 2), PATCH)
            if attention:
                heads = heads_needed(KERNEL, PATCH)
                mixer = PatchAttention(dim, dim, heads, head_dim=dim, key_dim=8)
                nn.init.trunc_normal_(mixer.position, std=0.02)
            mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
            self.blocks.extend([Residual(dim, mixer), Residual(dim, mlp)])
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.head(self.norm(self.blocks(self.embed(x).permute(0, 2, 3, 1))).mean((1, 2)))


def run(check: Check) -> None:
    """Measure the construction, the least number of heads, and a small training."""
    errors, leaks, right = [], [], 0
    for kernel, patch in SIZES:
        for channels in (1, 2, 3):
            error, leak, heads = layer_error(kernel, patch, channels)
            errors.append(error)
            leaks.append(leak)
        right += heads == (2 * math.ceil((kernel - 1) / (2 * patch)) + 1) ** 2
    check.require("largest difference of attention from the convolution", max(errors), "<=", ERROR)
    check.require("largest attention of a head to others than its patch", max(leaks), "<=", 1.001 * LEAK)
    check.require("sizes whose number of heads is the formula's", right, "==", len(SIZES))
    nine = [heads_needed(kernel, patch) for kernel, patch in SIZES if kernel <= 2 * patch + 1]
    check.require("heads for any K <= 2P + 1, the most", max(nine), "==", 9)
    found = [residuals(kernel, patch) for kernel, patch in SIZES]
    check.require("residual with one head removed, least", min(one for one, _ in found), ">", RESIDUAL)
    check.require(
        "bound of the residual for any eight heads, least", min(any_ for _, any_ in found), ">", RESIDUAL
    )

    images, test = fashion_mnist(IMAGES, 3000)
    epochs = STEPS * BATCH / IMAGES
    scores: dict[str, list[float]] = {"convolution first": [], "random": []}
    drops = []
    for seed in SEEDS:
        plain = PatchNetwork(seed, attention=True)
        train(plain, images, epochs=epochs, batch=BATCH, seed=seed, shift=1)
        scores["random"].append(accuracy(plain, test))
        first = PatchNetwork(seed, attention=False)
        train(first, images, epochs=epochs / 2, batch=BATCH, seed=seed, shift=1)
        second = convs_to_attention(first, GRID, leak=TRAINING_LEAK)
        drops.append(accuracy(first, test) - accuracy(second, test))
        train(second, images, epochs=epochs / 2, batch=BATCH, seed=seed, shift=1)
        scores["convolution first"].append(accuracy(second, test))
    means = {name: sum(values) / len(values) for name, values in scores.items()}
    check.require(
        "accuracy of a transformer from convolutions minus one from random weights, 500 images, mean of 3 seeds",
        means["convolution first"] - means["random"], ">=", GAIN, baseline=means["random"], unit="points",
    )  # fmt: skip
    check.note(f"accuracies {scores}; the conversion itself cost {drops} points")
