"""A 3x3 convolution whose splits compete for every channel beats an ordinary one of the same multiply-adds, and is a
grouped convolution, a gated one or ResNeXt's as special cases.

Counts are those of the paper's table and of its fast form. The training sees CIFAR-10 averaged to 16 x 16 pixels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.seeds import derive
from omniconv.design.cost import count_cost
from omniconv.layers.conv.split_attention import SplitAttentionConv2d
from omniconv.models.factory import create_model
from omniconv.models.image.resnest import ResNeStConfig, SplitAttentionBlock
from omniconv.models.image.resnet_blocks import Bottleneck, ResNetConfig
from omniconv.papers.check import Check
from omniconv.papers.small import accuracy, cifar10, train

PARAMETERS = {"resnest50d": 27.5e6, "resnest101e": 48.3e6, "resnest200e": 70.2e6, "resnest269e": 110.9e6}
PARAMETER_TOLERANCE = 0.005
MACS = {"resnest50d": 5.39e9, "resnest50d_fast": 4.34e9, "resnest101e": 10.2e9}
MACS_TOLERANCE = 0.02
ERROR = 1e-6
SAME_COST = 0.03
GAIN = 1.0
SEEDS = (0, 1, 2)
IMAGES, EPOCHS = 8000, 1
THIN = {"num_classes": 10, "depths": (1, 1), "widths": (16, 32), "stem": "3x3"}
NETWORKS = {
    "split attention": ("resnest50d_fast", {}),
    "plain": ("resnet50", {"shortcut": "pool"}),
    "squeeze and excitation": ("seresnet50", {"shortcut": "pool"}),
}


def _norm(x: Tensor, norm: nn.BatchNorm2d, part: slice) -> Tensor:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    statistics = (norm.running_mean[part], norm.running_var[part], norm.weight[part], norm.bias[part])
    return F.batch_norm(x, *statistics, eps=norm.eps)


def cardinal_groups(layer: SplitAttentionConv2d, x: Tensor) -> Tensor:
    """Return the layer's output as the paper's figure 2 computes it: cardinal group by group, split by split."""
    groups, radix = layer.cardinality, layer.radix
    share, hidden = layer.fc1.in_channels // groups, layer.fc1.out_channels // groups
    inner = x.shape[1] // (groups * radix)
    outputs = []
    for group in range(groups):
        splits = []
        for split in range(radix):
            index = split * groups + group
            part = slice(index * share, (index + 1) * share)
            u = F.conv2d(x[:, index * inner : (index + 1) * inner], layer.conv.weight[part], padding=1)
            splits.append(F.relu(_norm(u, layer.bn0, part)))
        z = torch.stack(splits).sum(0).mean((2, 3), keepdim=True)
        part = slice(group * hidden, (group + 1) * hidden)
        assert layer.fc1.bias is not None
        assert layer.fc2.bias is not None
        h = F.relu(_norm(F.conv2d(z, layer.fc1.weight[part], layer.fc1.bias[part]), layer.bn1, part))
        part = slice(group * radix * share, (group + 1) * radix * share)
        scores = F.conv2d(h, layer.fc2.weight[part], layer.fc2.bias[part]).unflatten(1, (radix, share))
        weights = scores.softmax(1) if radix > 1 else scores.sigmoid()
        outputs.append(torch.stack([weights[:, r] * splits[r] for r in range(radix)]).sum(0))
    return torch.cat(outputs, 1)


def loop_error(groups: int, radix: int) -> float:
    """Return the largest difference of the layer from the loop."""
    torch.manual_seed(0)
    layer = SplitAttentionConv2d(16, 8 * groups, groups=groups, radix=radix).double()
    layer(torch.randn(8, 16, 6, 6, dtype=torch.float64))
    x = torch.randn(2, 16, 6, 5, dtype=torch.float64)
    with torch.no_grad():
        return float((layer.eval()(x) - cardinal_groups(layer, x)).abs().max())


def attention_error() -> float:
    """Return by how much the attention over the splits fails to sum to one."""
    torch.manual_seed(0)
    layer = SplitAttentionConv2d(16, 16, groups=2, radix=4).double()
    with torch.no_grad():
        weights = layer.attention(torch.randn(5, 16, 1, 1, dtype=torch.float64))
    return float((weights.sum(1) - 1).abs().max())


def resnext_error() -> float:
    """Return how far a block of 32 groups, one split and open gates is from ResNeXt's."""
    torch.manual_seed(0)
    options = {"shortcut": "pool", "cardinality": 32, "base_width": 4}
    block = SplitAttentionBlock(ResNeStConfig(radix=1, **options), 64, 64, 1, 0, 0.0).double()
    plain = Bottleneck(ResNetConfig(**options), 64, 64, 1, 0, 0.0).double()
    nn.init.zeros_(block.conv2.fc2.weight)
    nn.init.constant_(block.get_parameter("conv2.fc2.bias"), 100.0)
    names = {
        name.replace("conv2.conv.", "conv2.").replace("conv2.bn0.", "bn2."): name
        for name in block.state_dict()
    }
    plain.load_state_dict({name: block.state_dict()[names[name]] for name in plain.state_dict()})
    x = torch.randn(2, 64, 7, 5, dtype=torch.float64)
    with torch.no_grad():
        return float((block(x) - plain(x)).abs().max())


def make_network(seed: int, kind: str) -> nn.Module:
    """Return one of the thin networks of 8 layers with bottlenecks."""
    torch.manual_seed(derive(seed, "weights"))
    name, options = NETWORKS[kind]
    model = create_model(name, **THIN, **options)
    return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def run(check: Check) -> None:
    """Measure counts, the layer's other forms, and a small training."""
    costs = {name: count_cost(create_model(name, device="meta"), (3, 224, 224)) for name in PARAMETERS | MACS}
    for name, published in PARAMETERS.items():
        off = abs(costs[name].parameters / published - 1)
        check.require(f"relative distance of the parameters of {name}", off, "<=", PARAMETER_TOLERANCE)
    for name, published in MACS.items():
        off = abs(costs[name].macs / published - 1)
        check.require(f"relative distance of the multiply-adds of {name}", off, "<=", MACS_TOLERANCE)

    worst = max(loop_error(groups, radix) for groups, radix in ((1, 2), (2, 2), (2, 4), (4, 1)))
    check.require("difference of the radix-major form from the loop over groups", worst, "<=", ERROR)
    check.require("distance of the attention's sum over the splits from 1", attention_error(), "<=", ERROR)
    check.require(
        "distance of one group and one split from a gated convolution", loop_error(1, 1), "<=", ERROR
    )
    check.require("distance of 32 groups and one open split from ResNeXt", resnext_error(), "<=", ERROR)

    macs = {kind: count_cost(make_network(0, kind), (3, 16, 16)).macs for kind in NETWORKS}
    apart = max(macs.values()) / min(macs.values()) - 1
    check.require("relative difference of the small networks' multiply-adds", apart, "<=", SAME_COST)
    training, test = ((F.avg_pool2d(x, 2), y) for x, y in cifar10(IMAGES, 2000))
    scores: dict[str, list[float]] = {kind: [] for kind in NETWORKS}
    for seed in SEEDS:
        for kind in NETWORKS:
            model = make_network(seed, kind)
            train(model, training, epochs=EPOCHS, batch=64, seed=seed, shift=1)
            scores[kind].append(accuracy(model, test))
    means = {kind: sum(values) / len(values) for kind, values in scores.items()}
    check.require(
        "accuracy of split attention minus plain, CIFAR-10, mean of 3 seeds",
        means["split attention"] - means["plain"], ">=", GAIN, baseline=means["plain"], unit="points",
    )  # fmt: skip
    rounded = {kind: [round(value, 2) for value in values] for kind, values in scores.items()}
    check.note(f"accuracies {rounded}; multiply-adds {macs}")
