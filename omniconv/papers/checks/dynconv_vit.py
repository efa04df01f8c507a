"""Self-attention is two dynamic 1x1 convolutions, what kind of convolution a layer is can be told from its derivatives,
and between the two convolutions ReLU and layer norm learn faster than softmax.

The small training sees 4,000 images of CIFAR-10. A loss is that of 256 training images, every few steps, in eval mode;
both networks have the same weights at first, sizes, recipe and seeds.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.seeds import derive
from omniconv.design.cost import count_cost
from omniconv.inspect.mixing import MixingView, probe_mixing
from omniconv.layers.attention.dynconv_attention import DepthwiseDynamicConv2d, DynamicConvAttention
from omniconv.layers.conv.condconv import ExpertConv2d, Routing
from omniconv.models.image.vit import VisionTransformer, ViTConfig
from omniconv.papers.check import Check
from omniconv.papers.small import Split, cifar10, train

ERROR = 1e-5
SHARE = 0.9
SEEDS = (0, 1, 2)
IMAGES, STEPS, BATCH, EVERY = 4000, 120, 48, 6
CONFIG = ViTConfig(dim=48, depth=3, num_heads=3, patch_size=4, img_size=32, mlp_ratio=2.0)
DECLARED = {
    "self-attention, 2 heads": MixingView(0, dynamic=True, shared_over_space=False, patterns=2),
    "involution 3x3, 2 groups": MixingView(3, dynamic=True, shared_over_space=False, patterns=2),
    "DynamicConv 3x3": MixingView(3, dynamic=True, shared_over_space=True, patterns=9),
    "CondConv 3x3": MixingView(3, dynamic=True, shared_over_space=True, patterns=9),
    "depthwise dynamic convolution 3x3": MixingView(3, dynamic=True, shared_over_space=True, patterns=4),
    "depthwise convolution 5x5": MixingView(5, dynamic=False, shared_over_space=True, patterns=4),
    "convolution 3x3": MixingView(3, dynamic=False, shared_over_space=True, patterns=9),
}


def equality_error() -> float:
    """Return the largest difference from torch's attention for 1 to 8 heads, in outputs and all gradients."""
    worst = 0.0
    for heads in (1, 2, 4, 8):
        torch.manual_seed(heads)
        layer = DynamicConvAttention(32, heads)
        x = torch.randn(2, 19, 32, requires_grad=True)
        probe = torch.randn(2, 19, 32)
        q, k, v = layer.qkv(x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        expected = layer.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        leaves = [x, *layer.parameters()]
        results = [
            [y.detach(), *torch.autograd.grad((y * probe).sum(), leaves)] for y in (layer(x), expected)
        ]
        worst = max(worst, *(float((a - b).abs().max()) for a, b in zip(*results, strict=True)))
    return worst


class Involution(nn.Module):
    """3x3 kernels that the pixel in the middle generates, one for each of two groups of channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.generate = nn.Conv2d(channels, 18, 1)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        """Mix the pixels of x."""
        windows = F.unfold(x, 3, padding=1).unflatten(1, (2, -1, 9))
        kernels = self.generate(source).flatten(2).unflatten(1, (2, 1, 9))
        return (windows * kernels).sum(3).flatten(1, 2).unflatten(2, x.shape[2:])


def probed() -> dict[str, MixingView]:
    """Return what seven layers are, from their derivatives."""
    torch.manual_seed(0)
    attention, involution = DynamicConvAttention(4, 2).double(), Involution(4).double()
    experts, routing = ExpertConv2d(4, 4, 3, padding=1).double(), Routing(4).double()
    nn.init.normal_(routing.weight)
    depthwise_dynamic = DepthwiseDynamicConv2d(4, 3).double()
    depthwise, dense = (
        nn.Conv2d(4, 4, 5, padding=2, groups=4).double(),
        nn.Conv2d(4, 4, 3, padding=1).double(),
    )
    mixers = {
        "self-attention, 2 heads": lambda x, source: attention(
            x.flatten(2).mT, source.flatten(2).mT
        ).mT.view_as(x),
        "involution 3x3, 2 groups": involution,
        "DynamicConv 3x3": lambda x, source: experts(
            x, F.linear(source.mean((2, 3)), routing.weight).softmax(1)
        ),
        "CondConv 3x3": lambda x, source: experts(x, routing(source)),
        "depthwise dynamic convolution 3x3": depthwise_dynamic,
        "depthwise convolution 5x5": lambda x, source: depthwise(x),
        "convolution 3x3": lambda x, source: dense(x),
    }
    return {name: probe_mixing(mix, 4) for name, mix in mixers.items()}


class Transformer(VisionTransformer):
    """A small DeiT with an activation and a norm of choice between its dynamic convolutions."""

    def __init__(self, seed: int, *, softmax: bool) -> None:
        self.softmax = softmax
        torch.manual_seed(derive(seed, "weights"))
        super().__init__(CONFIG, 10)

    def make_attention(self, index: int) -> nn.Module:
        """Return the attention of a block."""
        kind = ("softmax", "none") if self.softmax else ("relu", "layer")
        return DynamicConvAttention(CONFIG.dim, CONFIG.num_heads, *kind)


def losses(seed: int, images: Split, *, softmax: bool) -> list[float]:
    """Train and return the loss on the first 256 images after every few steps."""
    model = Transformer(seed, softmax=softmax)
    x, y = (part[:256] for part in images)
    found = []

    @torch.no_grad()
    def after_step(step: int, steps: int) -> None:
        if (step + 1) % EVERY == 0:
            found.append(float(F.cross_entropy(model.eval()(x), y)))
            model.train()

    train(model, images, epochs=STEPS * BATCH / IMAGES, batch=BATCH, seed=seed, after_step=after_step)
    return found


def run(check: Check) -> None:
    """Measure the equality, the table, the costs, and a small training."""
    check.require("difference of two dynamic convolutions from attention", equality_error(), "<=", ERROR)
    views = probed()
    for name, view in views.items():
        check.note(f"{name}: {view}")
    right = sum(views[name] == view for name, view in DECLARED.items())
    check.require("layers that are what they were declared to be", right, "==", len(DECLARED))

    side, dim, kernel = 14, 192, 7
    tokens = side**2
    attention = count_cost(DynamicConvAttention(dim, 3, device="meta"), (tokens, dim)).macs
    depthwise = count_cost(DepthwiseDynamicConv2d(dim, kernel, device="meta"), (dim, side, side)).macs
    ratio = (3 * dim + kernel**2) / (4 * dim + 2 * tokens)
    check.require(
        "multiply-adds of the depthwise layer over attention's, DeiT-Ti", depthwise / attention, "<", 1
    )
    check.require(
        "difference of that from (3 C + K K) / (4 C + 2 L)", abs(depthwise / attention - ratio), "<=", 1e-9
    )

    images, _ = cifar10(IMAGES, 1)
    shares, finals = [], []
    for seed in SEEDS:
        target = losses(seed, images, softmax=True)[-1]
        curve = losses(seed, images, softmax=False)
        reached = [index + 1 for index, loss in enumerate(curve) if loss <= target]
        shares.append(reached[0] / len(curve) if reached else float("inf"))
        finals.append((target, curve[-1]))
    check.require(
        "share of the steps in which ReLU and layer norm reach softmax's final loss, mean of 3 seeds",
        sum(shares) / len(shares), "<=", SHARE, baseline=1.0,
    )  # fmt: skip
    check.note(f"final losses (softmax, ReLU and layer norm): {finals}")
