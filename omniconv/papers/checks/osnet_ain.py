"""OSNet sees several scales through one gate at the published cost; instance norms make its descriptor indifferent to
style where they stand, and a search by gradients puts them early, which helps in a domain that was never seen.

People are generated: an identity is a pattern of 6 x 3 colours, a view of it a shifted and noisy picture of 48 x 24
pixels, and a domain the gains and offsets of its cameras' channels. The search trains weights in one domain and judges
places in another; a third is left to the test, with identities of its own.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.seeds import derive, generator
from omniconv.design.cost import count_cost
from omniconv.design.nas.osnet import Batch, SearchOSNet, search_places
from omniconv.models.factory import create_model
from omniconv.models.image.osnet import OSBlock, OSNet, OSNetConfig
from omniconv.papers.check import Check
from omniconv.papers.small import train
from omniconv.tasks.retrieval import rank_one, ranking

PUBLISHED = {
    "osnet_x1_0": (2.2e6, 978.9e6),
    "osnet_x0_75": (1.3e6, 571.8e6),
    "osnet_x0_5": (0.6e6, 272.9e6),
    "osnet_x0_25": (0.2e6, 82.3e6),
}
# Parameters are published in units of 0.1M; a count is held to half of the last digit or to 2%.
LAST_DIGIT = 0.05e6
COUNT_ERROR = 0.02
STYLE = 5.0
SEARCHES = 10
GOOD_SEARCHES = 8
EARLY = 2
RANDOM_SHARE = 0.75
GAIN = 3.0
SEEDS = (0, 1, 2)
SEARCH_STEPS = 30
CONFIG = OSNetConfig((16, 32, 48, 64), (("none",), ("none",), ("none",)), streams=2, feature_dim=64)
# Gains and offsets of the three channels, and how far a camera's own differ from them.
DOMAINS = {
    "first": ((1.0, 1.0, 1.0), (0.0, 0.0, 0.0), 0.05),
    "second": ((1.2, 0.9, 1.0), (0.2, -0.2, 0.0), 0.05),
    "unseen": ((0.5, 1.6, 0.8), (-0.6, 0.6, 0.3), 0.3),
}


def people(domain: str, identities: int, views: int, seed: int, group: str) -> Batch:
    """Return `views` pictures of every identity of a group, and whose they are."""
    colours = torch.randn(identities, 3, 6, 3, generator=generator(seed, "people", group))
    random = generator(seed, "views", group, domain)
    ids = torch.arange(identities).repeat_interleave(views)
    images = F.pad(F.interpolate(colours[ids], scale_factor=8, mode="nearest"), (3,) * 4, mode="replicate")
    moves = torch.randint(0, 7, (len(ids), 2), generator=random).tolist()
    images = torch.stack([x[:, y : y + 48, z : z + 24] for x, (y, z) in zip(images, moves, strict=True)])
    gains, offsets, spread = DOMAINS[domain]
    camera = spread * torch.randn(2, len(ids), 3, 1, 1, generator=random)
    images = images * (torch.tensor(gains)[:, None, None] * camera[0].exp())
    images = images + torch.tensor(offsets)[:, None, None] + camera[1]
    return images + 0.3 * torch.randn(images.shape, generator=random), ids


def _counts(check: Check) -> None:
    for name, (parameters, macs) in PUBLISHED.items():
        cost = count_cost(create_model(name, num_classes=0, device="meta"), (3, 256, 128))
        off = abs(cost.parameters - parameters)
        check.require(
            f"{name}: parameters without classifier differ from the published figure by",
            off, "<=", max(LAST_DIGIT, COUNT_ERROR * parameters),
        )  # fmt: skip
        check.require(f"{name}: multiply-adds off by", abs(cost.macs / macs - 1), "<=", COUNT_ERROR)


def _streams(check: Check) -> None:
    torch.manual_seed(0)
    block = OSBlock(64, 64).eval()
    wrong = 0
    for t, stream in enumerate(block.conv2, 1):
        for module in stream.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.uniform_(module.weight, 0.1, 1)
        x = torch.rand(1, 16, 15, 15, requires_grad=True)
        (gradient,) = torch.autograd.grad(stream(x)[0, :, 7, 7].sum(), x)
        seen = gradient[0].abs().sum(0) > 0
        window = torch.zeros_like(seen)
        window[7 - t : 8 + t, 7 - t : 8 + t] = True
        wrong += not torch.equal(seen, window)
    check.require("streams t of 4 whose receptive field is not (2t + 1) x (2t + 1)", wrong, "==", 0)

    gates = sum(p.numel() for name, p in block.named_parameters() if "gate" in name)
    single = sum(p.numel() for p in block.gate.parameters())
    check.require("parameters of all gates of a block over those of one", gates / single, "==", 1)
    nn.init.zeros_(block.gate.fc2.weight)
    nn.init.constant_(block.gate.fc2.get_parameter("bias"), 100.0)
    x = torch.randn(2, 64, 12, 9)
    reduced = block.conv1(x)
    plain = (block.conv3(sum(stream(reduced) for stream in block.conv2)) + x).relu()
    check.require(
        "with gates of one, difference from the plain sum",
        (block(x) - plain).abs().max().detach(),
        "<=",
        1e-5,
    )


@torch.no_grad()
def _style(check: Check) -> None:
    """Change the style of what enters the placed norms, in both networks, and see what reaches the descriptor."""
    random = generator(0, "style")
    torch.manual_seed(0)
    plain, searched = (create_model(f"osnet_{kind}x0_25", num_classes=0) for kind in ("", "ain_"))
    searched.load_state_dict(plain.state_dict(), strict=False)
    images = torch.randn(8, 3, 128, 64, generator=random)
    changes = []
    for model in (plain, searched):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
                module.momentum = 1.0
        model.train()(images)
        before = model.eval()(images)
        hooks = []
        for name, block in searched.named_modules():
            if isinstance(block, OSBlock) and block.inner_norm:
                conv = model.get_submodule(f"{name}.conv3.conv")
                channels = block.conv3.conv.out_channels
                style = generator(len(hooks), "style")
                gain = 0.5 + 1.5 * torch.rand(channels, 1, 1, generator=style)
                offset = torch.randn(channels, 1, 1, generator=style)
                hooks.append(
                    conv.register_forward_hook(lambda m, x, y, gain=gain, offset=offset: gain * y + offset)
                )
        changes.append(float((model(images) - before).norm() / before.norm()))
        for hook in hooks:
            hook.remove()
    check.require(
        "change of OSNet's descriptor under another style, over that of OSNet-AIN",
        changes[0] / changes[1], ">=", STYLE,
    )  # fmt: skip
    check.note(f"relative changes of the descriptor: OSNet {changes[0]:.3g}, OSNet-AIN {changes[1]:.3g}")


def _pairs(seed: int) -> Iterator[tuple[Batch, Batch]]:
    """Yield batches of the first domain beside batches of the second."""
    sources = [people(domain, 40, 8, seed, "train") for domain in ("first", "second")]
    random = generator(seed, "batches")
    for _ in itertools.count():
        chosen = [torch.randint(len(ids), (32,), generator=random) for _, ids in sources]
        first, second = ((x[which], ids[which]) for (x, ids), which in zip(sources, chosen, strict=True))
        yield first, second


@torch.no_grad()
def _rank_one(model: OSNet, seed: int) -> float:
    images, ids = people("unseen", 60, 4, seed, "test")
    model.eval()
    features: Tensor = model.forward_head(model.forward_features(images), pre_logits=True)
    query = torch.arange(len(ids)) % 4 == 0
    order = ranking(features[query].numpy(), features[~query].numpy())
    return 100 * rank_one(order, ids[query].numpy(), ids[~query].numpy())


def _search(check: Check) -> None:
    found = []
    for seed in range(SEARCHES):
        torch.manual_seed(derive(seed, "search"))
        found.append(search_places(SearchOSNet(CONFIG, 40), _pairs(seed), SEARCH_STEPS))
    early = [[place for stage in config.places for place in stage][:EARLY] for config in found]
    shares = [sum(place != "none" for place in places) / EARLY for places in early]
    check.require(
        "searches of 10 that put instance norms into more of the early blocks than chance would",
        sum(share > RANDOM_SHARE for share in shares), ">=", GOOD_SEARCHES,
    )  # fmt: skip
    scores: dict[str, list[float]] = {"searched": [], "without": []}
    for seed in SEEDS:
        parts = [people(domain, 40, 8, seed, "train") for domain in ("first", "second")]
        split = torch.cat([x for x, _ in parts]), torch.cat([ids for _, ids in parts])
        for kind, config in (("searched", found[seed]), ("without", CONFIG)):
            torch.manual_seed(derive(seed, "weights"))
            model = OSNet(config, 40)
            train(model, split, epochs=6, batch=32, seed=seed, shift=0, flip=False)
            scores[kind].append(_rank_one(model, seed))
    means = {kind: sum(values) / len(values) for kind, values in scores.items()}
    check.require(
        "rank-1 in the unseen domain, searched places minus no instance norms, mean of 3 seeds",
        means["searched"] - means["without"], ">=", GAIN, baseline=means["without"], unit="points",
    )  # fmt: skip
    check.note(f"places found: {'; '.join(str(config.places) for config in found)}")
    check.note(
        f"rank-1 with searched places {scores['searched']}, without instance norms {scores['without']}"
    )


def run(check: Check) -> None:
    """Measure costs, scales, style, and the search."""
    _counts(check)
    _streams(check)
    _style(check)
    _search(check)
