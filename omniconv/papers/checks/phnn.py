"""A kernel that is a sum of Kronecker products of learned algebra matrices and filters costs 1/n of the weights, is a
complex or quaternion convolution when its algebra is, learns that algebra from products alone, and costs hardly any
accuracy.

Quaternions are multiplied by a layer that mixes eight of them, so that its kernel has 256 free filters and not the
1,024 weights of a full one. Its rival has as many weights and the fixed algebra of bicomplex numbers, pairs of complex
ones; a plain complex layer (n = 2, twice the weights) could do it, for multiplication by a quaternion from the left is
complex-linear: it commutes with that by j from the right. The small training sees CIFAR-10 averaged to 16 x 16 pixels,
with a channel of zeros as the fourth part, with the same recipe and seeds for both networks.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import functional_call
from torch.nn import functional as F

from omniconv.core.seeds import derive, generator
from omniconv.layers.conv.phconv import PHConv2d, PHLinear, hypercomplex, multiplication_table
from omniconv.models.factory import create_model
from omniconv.papers.check import Check
from omniconv.papers.small import Split, accuracy, cifar10, train

EXACT = 1e-6
SHARE = 0.02
LEARNED, UNLEARNED = 1e-4, 1e-2
SPAN = 1e-2
MARGIN = -3.0
SEEDS = (0, 1, 2)


def formula_errors() -> int:
    """Return in how many layers the parameters are not n^3 + k^2 C_in C_out / n."""
    sizes = [(n, k, 12 * a, 12 * b) for n in (1, 2, 3, 4, 6) for k in (1, 3) for a in (1, 2) for b in (1, 3)]
    return sum(
        sum(p.numel() for p in PHConv2d(c, out, k, n=n, bias=False).parameters())
        != n**3 + k * k * c * out // n
        for n, k, c, out in sizes
    )


def conv_weights(model: nn.Module) -> int:
    """Return the parameters of all convolutions."""
    return sum(
        p.numel() for m in model.modules() if isinstance(m, nn.Conv2d | PHConv2d) for p in m.parameters()
    )


def resnet18_share(n: int) -> float:
    """Return the convolution weights of a hypercomplex ResNet-18 as a multiple of 1/n of the real one's."""
    # Channels are those that n divides: of four-channel images, or of RGB with widths near 64, 128 ...
    options: dict[str, Any] = {"in_chans": 4}
    if n == 3:
        options = {"stem": "3x3", "widths": (63, 126, 252, 504)}
    real = create_model("resnet18", device="meta", **options)
    return conv_weights(hypercomplex(real, n)) / conv_weights(real) * n


def hamilton(filters: Tensor, x: Tensor) -> Tensor:
    """Convolve quaternions (N, 4 C, H, W) with quaternion filters (4 out, C, k, k), part by part."""
    a, b, c, d = filters.chunk(4)
    r, i, j, k = x.chunk(4, 1)

    def conv(weight: Tensor, part: Tensor) -> Tensor:
        return F.conv2d(part, weight, padding=1)

    return torch.cat(
        [
            conv(a, r) - conv(b, i) - conv(c, j) - conv(d, k),
            conv(a, i) + conv(b, r) + conv(c, k) - conv(d, j),
            conv(a, j) - conv(b, k) + conv(c, r) + conv(d, i),
            conv(a, k) + conv(b, j) - conv(c, i) + conv(d, r),
        ],
        1,
    )


@torch.no_grad()
def algebra_errors() -> dict[str, float]:
    """Return the largest differences from quaternion, complex and ordinary convolutions."""
    torch.manual_seed(0)
    x = torch.randn(2, 8, 9, 7)
    quaternion = PHConv2d(8, 12, 3, n=4, padding=1, bias=False, algebra="quaternion", fixed=True)
    complex_ = PHConv2d(8, 12, 3, n=2, padding=1, bias=False, algebra="complex", fixed=True)
    product = F.conv2d(torch.complex(x[:, :4], x[:, 4:]), torch.complex(*complex_.F.chunk(2)), padding=1)
    plain, one = nn.Conv2d(8, 12, 3, padding=1), PHConv2d(8, 12, 3, n=1, padding=1)
    one.load_state_dict({"A": torch.ones(1, 1, 1), "F": plain.weight, "bias": plain.bias})
    learned = PHConv2d(8, 12, 3, n=4, padding=1)
    pairs = {
        "Hamilton's product": (quaternion(x), hamilton(quaternion.F, x)),
        "complex product": (complex_(x), torch.cat([product.real, product.imag], 1)),
        "ordinary convolution (n = 1)": (one(x), plain(x)),
        "merged kernel": (learned.merged()(x), learned(x)),
    }
    return {name: float((ours - theirs).abs().max()) for name, (ours, theirs) in pairs.items()}


def gradients_pass() -> bool:
    """Return whether the gradients to A and F are those of finite differences."""
    torch.manual_seed(0)
    layer = PHConv2d(4, 6, 3, n=2).double()
    x = torch.randn(2, 4, 5, 4, dtype=torch.float64)
    names = list(dict(layer.named_parameters()))

    def function(*tensors: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(names, tensors, strict=True)), (x,))

    return gradcheck(function, [p.detach().requires_grad_() for p in layer.parameters()])


def fit_products(layer: PHLinear, seed: int, steps: int = 1500) -> float:
    """Fit a hidden layer of quaternions and return the mean squared error on new ones; the targets' variance is 1."""
    size = len(layer.F)
    torch.manual_seed(derive(seed, "target"))
    target = PHLinear(size, size, n=4, bias=False, algebra="quaternion", fixed=True)
    nn.init.normal_(target.F, std=size**-0.5)
    random = generator(seed, "quaternions")
    optimizer = torch.optim.Adam(layer.parameters(), 2e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x = torch.randn(128, size, generator=random)
        loss = F.mse_loss(layer(x), target(x).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    x = torch.randn(4096, size, generator=random)
    with torch.no_grad():
        return F.mse_loss(layer(x), target(x)).item()


def span_error(layer: PHLinear) -> float:
    """Return the sine of the largest angle between the learned matrices' span and the quaternions'."""
    learned = torch.linalg.qr(layer.A.detach().flatten(1).T)[0]
    wanted = torch.linalg.qr(multiplication_table("quaternion").flatten(1).T)[0]
    return float(torch.linalg.matrix_norm(learned - wanted @ (wanted.T @ learned), 2))


def with_zeros(split: Split) -> Split:
    """Return the images at half the size, with a fourth channel of zeros."""
    images, labels = split
    return F.pad(F.avg_pool2d(images, 2), (0, 0, 0, 0, 0, 1)), labels


def make_network(seed: int, n: int) -> nn.Module:
    """Return a small residual network, hypercomplex unless n is 1."""
    torch.manual_seed(derive(seed, "weights"))
    model = create_model(
        "resnet18", num_classes=10, in_chans=4, depths=(1, 1, 1), widths=(16, 32, 64), stem="3x3"
    )
    model = hypercomplex(model, n) if n > 1 else model
    return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def run(check: Check) -> None:
    """Measure counts, special algebras, an algebra learned from products, and a small training."""
    check.require("layers whose parameters are not n^3 + k^2 C_in C_out / n", formula_errors(), "==", 0)
    for n in (2, 3, 4):
        check.require(
            f"ResNet-18's convolution weights at n = {n}, off 1/n of the real network's by a share of",
            abs(resnet18_share(n) - 1), "<=", SHARE,
        )  # fmt: skip
    for name, error in algebra_errors().items():
        check.require(f"difference from {name}", error, "<=", 0 if "n = 1" in name else EXACT)
    check.require("gradients to A and F pass gradcheck", gradients_pass(), "==", True)

    complex_table = multiplication_table("complex")
    bicomplex = torch.einsum("ipq,jrs->ijprqs", complex_table, complex_table).reshape(4, 4, 4)
    learned, spans, baseline = [], [], []
    for seed in SEEDS:
        torch.manual_seed(derive(seed, "learned"))
        layer = PHLinear(32, 32, n=4, bias=False)
        learned.append(fit_products(layer, seed))
        spans.append(span_error(layer))
        fixed = PHLinear(32, 32, n=4, bias=False, algebra="quaternion", fixed=True)
        fixed.A.copy_(bicomplex)
        baseline.append(fit_products(fixed, seed))
    check.require(
        "error of an algebra learned from quaternion products, worst of 3 seeds",
        max(learned), "<", LEARNED, baseline=min(baseline),
    )  # fmt: skip
    check.require("the same of fixed bicomplex numbers, best of 3 seeds", min(baseline), ">", UNLEARNED)
    check.require(
        "sine of the angle between the learned algebra and the quaternions, worst", max(spans), "<=", SPAN
    )

    images, test = (with_zeros(split) for split in cifar10(10000, 2000))
    scores: dict[int, list[float]] = {4: [], 1: []}
    for seed in SEEDS:
        for n in scores:
            model = make_network(seed, n)
            train(model, images, epochs=4, seed=seed, shift=1)
            scores[n].append(accuracy(model, test))
    means = {n: sum(values) / len(values) for n, values in scores.items()}
    check.require(
        "accuracy with n = 4 minus that of the real network, CIFAR-10 subset, mean of 3 seeds",
        means[4] - means[1], ">=", MARGIN, baseline=means[1], unit="points",
    )  # fmt: skip
    check.note(f"accuracies with n = 4 {scores[4]}, real {scores[1]}")
