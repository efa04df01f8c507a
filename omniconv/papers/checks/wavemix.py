"""A wavelet transform, lossless and without weights, widens the receptive field of a block to 2^(levels + 1)
pixels, and a network of such blocks learns as well as a ResNet of equal parameters with less memory for activations.

The four counts are those of the authors' page. The training has WaveMix-Lite-16/7 and ResNet-20 with 6, 12 and 24
channels, whose parameters agree within 1%, on Fashion-MNIST averaged to 14 x 14 pixels, both without dropout.
Memory is what autograd keeps of one batch of 16 images of 28 x 28 pixels until the backward pass, parameters apart,
every storage once.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.seeds import derive
from omniconv.models.factory import create_model
from omniconv.models.image.wavemix import WaveMixBlock, WaveMixConfig
from omniconv.ops.haar import haar_dwt2d, haar_idwt2d
from omniconv.papers.check import Check
from omniconv.papers.small import accuracy, fashion_mnist, train

PUBLISHED = {
    "wavemix_lite_8_10_up": (1, 3_566), "wavemix_lite_8_5": (1, 7_156),
    "wavemix_lite_32_7_up": (3, 37_058), "wavemix_lite_64_6": (3, 520_106),
}  # fmt: skip
INVERSE_ERROR = 1e-6
ENERGY_ERROR = 1e-5
MATRIX_ERROR = 1e-6
MARGIN = -0.5
SEEDS = (0, 1, 2)
IMAGES, EPOCHS = 10000, 2
NETS = {
    "WaveMix-Lite-16/7": ("wavemix_lite_16_7", {"drop_rate": 0.0}),
    "ResNet": ("resnet20_cifar", {"widths": (6, 12, 24)}),
}


def count(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(p.numel() for p in model.parameters())


def block_parameters(width: int, levels: int, mult: int = 2) -> int:
    """Return the parameters of a block by the paper's description."""
    total = width * width // 4 + width // 4
    for level in range(1, levels + 1):
        inside = width if level == levels else width + width // 2
        outside = width if level == 1 else width // 2
        hidden = mult * width
        total += inside * hidden + hidden + hidden * width + width
        total += 16 * width * outside + outside + 2 * outside
    return total


def check_transform(check: Check) -> None:
    """Hold the transform against its inverse, its energy and its matrix."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 48, 80)
    low, high = haar_dwt2d(x)
    check.require(
        "largest difference after transform and inverse",
        float((haar_idwt2d(low, high) - x).abs().max()), "<=", INVERSE_ERROR,
    )  # fmt: skip
    energy = float((low.square().sum() + high.square().sum()) / x.square().sum())
    check.require("relative change of the energy", abs(energy - 1), "<=", ENERGY_ERROR)

    def matrix(size: int) -> Tensor:
        pairs = torch.eye(size // 2)
        return torch.cat(
            (torch.kron(pairs, torch.ones(1, 2)), torch.kron(pairs, torch.tensor([[1.0, -1.0]])))
        ) / 2**0.5  # fmt: skip

    y = matrix(48) @ x @ matrix(80).T
    whole = torch.cat((torch.cat((low, high[:, :, 1]), 3), torch.cat((high[:, :, 0], high[:, :, 2]), 3)), 2)
    error = float((whole - y).abs().max())
    check.require("difference from the product with Haar's matrix on both sides", error, "<=", MATRIX_ERROR)


def field(levels: int, depth: int) -> int:
    """Return over how many columns the gradient of a middle pixel is not zero after `depth` blocks."""
    torch.manual_seed(0)
    blocks = nn.Sequential(*(WaveMixBlock(WaveMixConfig(8, levels=levels)) for _ in range(depth)))
    x = torch.randn(1, 8, 16, 256, dtype=torch.float64, requires_grad=True)
    y = blocks.double().eval()(x)
    (gradient,) = torch.autograd.grad(y[0, :, 8, 128].sum(), x)
    seen = gradient.abs().amax((0, 1, 2)).nonzero()
    return int(seen.max() - seen.min()) + 1


def saved_bytes(model: nn.Module, images: Tensor) -> int:
    """Return how many bytes autograd keeps for the backward pass, parameters apart."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(images).sum()
    loss.backward()
    return sum(kept.values())


def make_network(title: str, seed: int) -> nn.Module:
    """Return one of the two networks of the training."""
    name, options = NETS[title]
    torch.manual_seed(derive(seed, "weights"))
    model = create_model(name, num_classes=10, in_chans=1, **options)
    return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def run(check: Check) -> None:
    """Measure transform, counts, fields, memory, and a small training."""
    check_transform(check)
    for name, (channels, parameters) in PUBLISHED.items():
        model = create_model(name, num_classes=10, in_chans=channels, device="meta")
        check.require(f"{name}: parameters", count(model), "==", parameters)
    right = sum(
        count(WaveMixBlock(WaveMixConfig(width, levels=levels))) == block_parameters(width, levels)
        for width, levels in ((16, 1), (64, 2), (32, 3), (192, 4))
    )
    check.require("blocks of 1 to 4 levels with the parameters of the formula", right, "==", 4)
    fields = {levels: field(levels, 1) for levels in (1, 2, 3, 4)}
    for levels, columns in fields.items():
        check.require(
            f"receptive field of a block of {levels} levels", columns, ">=", 2 ** (levels + 1), unit="px"
        )
    growth = min(field(1, depth + 1) - field(1, depth) for depth in (1, 2, 3))
    check.require(
        "pixels that each further block of one level adds; a 3x3 convolution adds 2", growth, ">", 2
    )
    check.note(f"receptive fields by levels {fields}")

    images = torch.randn(16, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    memory = {title: saved_bytes(make_network(title, 0), images) / 2**20 for title in NETS}
    check.require(
        "memory of activations, WaveMix-Lite-16/7 over a ResNet of equal parameters",
        memory["WaveMix-Lite-16/7"] / memory["ResNet"], "<", 1, baseline=memory["ResNet"],
    )  # fmt: skip
    sizes = {title: count(make_network(title, 0)) for title in NETS}
    check.note(f"MiB kept {memory}, parameters {sizes}")

    training, test = ((F.avg_pool2d(x, 2), y) for x, y in fashion_mnist(IMAGES, 10000))
    scores: dict[str, list[float]] = {title: [] for title in NETS}
    for seed in SEEDS:
        for title in NETS:
            model = make_network(title, seed)
            train(model, training, epochs=EPOCHS, seed=seed, shift=1)
            scores[title].append(accuracy(model, test))
    means = {title: sum(values) / len(values) for title, values in scores.items()}
    check.require(
        "accuracy of WaveMix-Lite-16/7 minus the ResNet's, Fashion-MNIST, mean of 3 seeds",
        means["WaveMix-Lite-16/7"] - means["ResNet"], ">=", MARGIN, baseline=means["ResNet"], unit="points",
    )  # fmt: skip
    check.note(f"accuracies {scores}")
