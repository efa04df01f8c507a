"""One frame of query, keys and values holds attention and the feed-forward network, and filled with convolutions it
mixes pixels better than no mixer, and no worse than a plain 7x7 depthwise convolution; FFNet has the published size and
cost, and folds into single convolutions.

The trainings see 32-pixel pictures and networks of two stages, in which the token mixers are all that differs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.seeds import derive
from omniconv.deploy.accelerate import accelerate
from omniconv.design.cost import count_cost
from omniconv.layers.attention.metamixer import FFNifiedAttention, MetaMixer, ProjectedKeys, ProjectedValues
from omniconv.layers.conv.conv_norm import ConvNorm2d
from omniconv.layers.conv.rep_depthwise import RepDepthwiseConv2d
from omniconv.models.factory import create_model
from omniconv.models.image.ffnet import ResidualPointwise
from omniconv.papers.check import Check
from omniconv.papers.small import Split, accuracy, cifar10, train

PUBLISHED = {"ffnet_1": (13.7e6, 2.9e9), "ffnet_2": (26.9e6, 6.0e9), "ffnet_3": (48.3e6, 10.1e9)}
PARAMETER_ERROR = 0.01
MACS_ERROR = 0.03
FOLD_ERROR = 1e-4
FRAME_ERROR = 1e-6
OVER_IDENTITY = 5.0
OVER_DEPTHWISE = 0.0
SEEDS = (0, 1, 2)
IMAGES, EPOCHS, BATCH = 10000, 1.7, 64
SMALL: dict[str, Any] = {"depths": (1, 1), "widths": (32, 64), "stem_width": 16, "kernel_sizes": (7, 7)}


def disturb(model: nn.Module) -> None:
    """Give every batch norm random statistics and weights, and leave training mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.get_buffer("running_var"), 0.5, 1.5)
            nn.init.normal_(module.get_buffer("running_mean"), 0, 0.2)
            nn.init.uniform_(module.weight, 0.3, 0.9)
            nn.init.normal_(module.bias, 0, 0.2)
    model.eval()


def distance(y: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest value."""
    return float((y - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def folding(check: Check) -> None:
    """Require of every foldable part, and of a whole network, that its folded form is the same."""
    torch.manual_seed(0)
    parts = {
        "convolution and norm": ConvNorm2d(8, 8, 3),
        "parallel kernels": RepDepthwiseConv2d(8, 7, 3, multiplier=2, stride=2),
        "shortcut and mixture": ResidualPointwise(8),
    }
    x = torch.randn(2, 8, 17, 13)
    for name, part in parts.items():
        disturb(part)
        merged = part.merged()
        single = isinstance(merged, nn.Conv2d)
        check.require(f"{name}: folded into one convolution", single, "==", True)
        check.require(
            f"{name}: difference of the folded form", distance(merged(x), part(x)), "<=", FOLD_ERROR
        )
    model = create_model("ffnet_1", num_classes=10)
    disturb(model)
    x = torch.randn(2, 3, 96, 128)
    error = distance(model.deploy()(x), model(x))
    check.require("FFNet-1: difference of the folded form", error, "<=", FOLD_ERROR)


@torch.no_grad()
def frame(check: Check) -> None:
    """Require that the frame holds attention and the feed-forward network."""
    torch.manual_seed(0)
    query = nn.Conv2d(32, 32, 1)
    mixer = MetaMixer(query, ProjectedKeys(32, 4), nn.Softmax(-1), ProjectedValues(32, 4), dynamic=True)
    reference = nn.MultiheadAttention(32, 4, batch_first=True)
    convs = [query, mixer.keys.get_submodule("proj"), mixer.values.get_submodule("proj")]
    weights = [conv.get_parameter("weight").flatten(1) for conv in convs]
    reference.in_proj_weight.copy_(torch.cat(weights))
    reference.in_proj_bias.copy_(torch.cat([conv.get_parameter("bias") for conv in convs]))
    reference.out_proj.weight.copy_(mixer.values.get_parameter("out.weight").flatten(1))
    reference.out_proj.bias.copy_(mixer.values.get_parameter("out.bias"))
    x = torch.randn(2, 32, 7, 9)
    tokens = x.flatten(2).transpose(1, 2)
    attended = reference(tokens, tokens, tokens, need_weights=False)[0]
    error = float((mixer(x).flatten(2).transpose(1, 2) - attended).abs().max())
    check.require("difference from multi-head attention", error, "<=", FRAME_ERROR)

    keys, values = nn.Conv2d(32, 128, 1), nn.Conv2d(128, 32, 1)
    hidden = F.gelu(F.linear(tokens, keys.weight.flatten(1), keys.bias))
    expected = F.linear(hidden, values.weight.flatten(1), values.bias)
    y = MetaMixer(nn.Identity(), keys, nn.GELU(), values)(x).flatten(2).transpose(1, 2)
    check.require("difference from a feed-forward network", (y - expected).abs().max(), "<=", FRAME_ERROR)


MIXERS: dict[str, Callable[[int], nn.Module]] = {
    "FFNified": lambda width: FFNifiedAttention(width, 7),
    "depthwise": lambda width: RepDepthwiseConv2d(width, 7, 3),
    "identity": lambda width: nn.Identity(),
}


def trained(mixer: str, seed: int, images: Split, test: Split) -> float:
    """Return the test accuracy of a small FFNet with this token mixer."""
    torch.manual_seed(derive(seed, "weights"))
    model = create_model("ffnet_1", num_classes=10, **SMALL)
    for stage, width in zip(model.get_submodule("stages").children(), SMALL["widths"], strict=True):
        for block in stage.get_submodule("blocks").children():
            block.token_mixer = MIXERS[mixer](width)
    train(accelerate(model), images, epochs=EPOCHS, batch=BATCH, seed=seed)
    return accuracy(model, test)


def run(check: Check) -> None:
    """Measure counts, folding, the frame, and small trainings."""
    for name, (parameters, macs) in PUBLISHED.items():
        cost = count_cost(create_model(name, device="meta").deploy(), (3, 256, 256))
        error = abs(cost.parameters / parameters - 1)
        check.require(f"{name}: parameters off the published ones by", error, "<=", PARAMETER_ERROR)
        error = abs(cost.macs / macs - 1)
        check.require(f"{name}: multiply-adds off the published ones by", error, "<=", MACS_ERROR)
    folding(check)
    frame(check)

    images, test = cifar10(IMAGES)
    scores = {mixer: [trained(mixer, seed, images, test) for seed in SEEDS] for mixer in MIXERS}
    means = {mixer: sum(values) / len(values) for mixer, values in scores.items()}
    for other, margin in (("identity", OVER_IDENTITY), ("depthwise", OVER_DEPTHWISE)):
        check.require(
            f"accuracy with FFNified attention minus with {other}, mean of 3 seeds",
            means["FFNified"] - means[other], ">=", margin, baseline=means[other], unit="points",
        )  # fmt: skip
    check.note(f"accuracies: {scores}")
