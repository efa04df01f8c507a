"""An affine map in place of every token mixer folds into the norm before it, so that a deployed RIFormer has
PoolFormer's size, fewer operations, and runs faster; taught by a network with mixers it beats the same network trained
on labels.

The paper's norm is over a whole map, whose two statistics all pixels share; the independence of pixels that is required
here is that at given statistics. The teacher is a MetaFormer of the same layout with separable 7x7 convolutions. The
student starts from its weights, imitates its soft labels and the outputs of its mixers and blocks, and sees no label.
"""

import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.seeds import derive
from omniconv.deploy.accelerate import accelerate
from omniconv.design.cost import count_cost
from omniconv.models.backbone import Backbone
from omniconv.models.factory import create_model
from omniconv.models.image.riformer import AffineMixer
from omniconv.models.image.stages import MetaFormerBlock
from omniconv.papers.check import Check
from omniconv.papers.small import accuracy, fashion_mnist, train

MERGE_ERROR = 1e-5
PARAMETERS = {"riformer_s12": ("poolformer_s12", 11.9e6), "riformer_s24": ("poolformer_s24", 21.4e6)}
PARAMETER_ERROR = 0.01
FASTER = 1.1
ROUNDS = 9
POINTS = 1.0
SEEDS = (0, 1, 2)
LAYOUT: dict[str, Any] = {
    "num_classes": 10,
    "in_chans": 1,
    "depths": (2, 2),
    "widths": (32, 64),
    "layer_scale": 1.0,
}
IMAGES = 10000
RECIPE: dict[str, Any] = {"epochs": 2}


def blocks_of(model: nn.Module) -> list[MetaFormerBlock]:
    """Return the blocks in the order in which they run."""
    return [module for module in model.modules() if isinstance(module, MetaFormerBlock)]


def disturb(model: Backbone) -> Backbone:
    """Draw scales and shifts anew: published ones of 1e-5 would hide the branches."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.3, 1.0)
    return model.eval()


class GivenStatistics(nn.Module):
    """A group norm over the map whose statistics count as given."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x`, with no gradient through its mean and deviation."""
        deviation, mean = torch.std_mean(x.detach(), (1, 2, 3), correction=0, keepdim=True)
        y = (x - mean) / (deviation.square() + self.norm.eps).sqrt()
        return y * self.norm.weight[:, None, None] + self.norm.bias[:, None, None]


def coupling(name: str, *, given: bool) -> float:
    """Return the largest gradient between two pixels of a block, over that of a pixel with respect to itself."""
    mixers: dict[str, Any] = {"mixers": ("pool", "pool")} if name.startswith("pool") else {}
    model = create_model(name, num_classes=0, depths=(1, 1), widths=(8, 16), **mixers)
    model = disturb(model).double()
    worst = 0.0
    for block, width in zip(blocks_of(model), (8, 16), strict=True):
        if given:
            for norm in ("norm1", "norm2"):
                inner = block.get_submodule(norm)
                assert isinstance(inner, nn.GroupNorm)
                block.set_submodule(norm, GivenStatistics(inner))
        x = torch.randn(1, width, 9, 7, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(block(x)[0, :, 4, 3].sum(), x)
        strength = gradient[0].abs().amax(0)
        own = strength[4, 3].item()
        strength[4, 3] = 0
        worst = max(worst, strength.max().item() / own)
    return worst


def milliseconds(models: dict[str, nn.Module]) -> dict[str, float]:
    """Return the median time of a forward pass of each model, measured in turns."""
    x = torch.randn(4, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for turn in range(ROUNDS + 2):
            for name, model in models.items():
                started = time.perf_counter()
                model(x)
                if turn >= 2:
                    times[name].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in times.items()}


def pooled_values(model: nn.Module) -> int:
    """Return how many values the model's average pools put out for an image of 224 pixels."""
    counts: list[int] = []
    for module in model.modules():
        if isinstance(module, nn.AvgPool2d):
            module.register_forward_hook(lambda m, x, y: counts.append(y[0].numel()))
    with torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device="meta"))
    return sum(counts)


def deployed(check: Check) -> None:
    """Measure the folded form, counts, independence and speed."""
    model = disturb(create_model("riformer_s12", num_classes=10))
    merged = model.deploy()
    x = torch.randn(2, 3, 96, 128)
    with torch.no_grad():
        wanted = model(x)
        error = (merged(x) - wanted).abs().max() / wanted.abs().max()
    check.require("difference of the folded form", error, "<=", MERGE_ERROR)
    left = sum(isinstance(module, AffineMixer | nn.AvgPool2d) for module in merged.modules())
    check.require("mixers in the folded form", left, "==", 0, baseline=len(blocks_of(model)))

    for name, (pool, published) in PARAMETERS.items():
        cost = count_cost(create_model(name, device="meta").deploy(), (3, 224, 224))
        error = abs(cost.parameters / published - 1)
        check.require(f"{name}: parameters off the published ones by", error, "<=", PARAMETER_ERROR)
        other = create_model(pool, device="meta")
        # A 3x3 average is nine additions a value, which the counter of multiply-adds does not see.
        macs = count_cost(other, (3, 224, 224)).macs + 9 * pooled_values(other)
        check.require(f"{name}: operations", cost.macs / 1e9, "<", macs / 1e9, baseline=macs / 1e9, unit="G")

    apart, mixed = coupling("riformer_s12", given=True), coupling("poolformer_s12", given=True)
    check.require(
        "gradient between two pixels of a block at given statistics", apart, "==", 0, baseline=mixed
    )
    check.require("the same with PoolFormer's mixers", mixed, ">", 0)
    check.note(f"Through the statistics of 63 pixels it is {coupling('riformer_s12', given=False):.2g}.")

    networks = {
        name: create_model(name).eval().deploy().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        for name in ("riformer_s12", "poolformer_s12")
    }
    times = milliseconds(networks)
    check.require(
        "throughput of RIFormer-S12 over PoolFormer-S12", times["poolformer_s12"] / times["riformer_s12"],
        ">=", FASTER, baseline=1.0,
    )  # fmt: skip
    check.note(f"Milliseconds for 4 images: {times['riformer_s12']:.0f} and {times['poolformer_s12']:.0f}.")


class Imitation:
    """The loss of a student that imitates a teacher's soft labels, mixers and blocks; labels are not looked at.

    Whatever the student sees, the teacher sees first.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module) -> None:
        self.teacher = teacher.eval()
        self.soft = torch.empty(0)
        self.taught: list[Tensor] = []
        self.tried: list[Tensor] = []
        self.hooks = [student.register_forward_pre_hook(self.ask)]
        for model, kept in ((teacher, self.taught), (student, self.tried)):
            for block in blocks_of(model):
                for module in (block.token_mixer, block):
                    hook = module.register_forward_hook(lambda m, x, y, kept=kept: kept.append(y))
                    self.hooks.append(hook)

    def ask(self, student: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Let the teacher see the student's images."""
        self.taught.clear()
        self.tried.clear()
        with torch.no_grad():
            self.soft = self.teacher(*inputs).log_softmax(1)

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the divergence of the soft labels, plus the mean squared error of all maps."""
        divergence = F.kl_div(logits.log_softmax(1), self.soft, reduction="batchmean", log_target=True)
        pairs = zip(self.tried, self.taught, strict=True)
        return divergence + torch.stack([F.mse_loss(ours, theirs) for ours, theirs in pairs]).mean()

    def stop(self) -> None:
        """Listen to both networks no longer."""
        for hook in self.hooks:
            hook.remove()


def taught(check: Check) -> None:
    """Train students on labels, and from a teacher."""
    images, test = fashion_mnist(IMAGES, 10000)

    def make(name: str, seed: int, **more) -> Backbone:
        torch.manual_seed(derive(seed, name))
        return accelerate(create_model(name, **LAYOUT, **more))

    teacher = make("poolformer_s12", 0, mixers=("conv", "conv"))
    train(teacher, images, **RECIPE)
    weights = {
        name: tensor.clone() for name, tensor in teacher.state_dict().items() if "token_mixer" not in name
    }
    scores: dict[str, list[float]] = {"taught": [], "labels": []}
    for seed in SEEDS:
        student = make("riformer_s12", seed)
        train(student, images, seed=seed, **RECIPE)
        scores["labels"].append(accuracy(student, test))
        student = make("riformer_s12", seed)
        student.load_state_dict(weights, strict=False)
        imitation = Imitation(teacher, student)
        train(student, images, seed=seed, loss=imitation, **RECIPE)
        imitation.stop()
        scores["taught"].append(accuracy(student, test))
    means = {name: sum(values) / len(values) for name, values in scores.items()}
    check.require(
        "accuracy taught minus trained on labels, Fashion-MNIST, mean of 3 seeds",
        means["taught"] - means["labels"], ">=", POINTS, baseline=means["labels"], unit="points",
    )  # fmt: skip
    check.note(f"accuracies {scores}, of the teacher {accuracy(teacher, test):.2f}")


def run(check: Check) -> None:
    """Measure the folded form, and what a teacher is worth."""
    deployed(check)
    taught(check)
