"""Local features without their component along the global one add what the whole lacks: a descriptor of both finds more
than one of the whole alone, and more than plain concatenation.

Landmarks are generated: a scene of coarse colours, of which several landmarks share one, and a small mark somewhere in
it. All networks are trained alike on some combinations of scene and mark with ArcFace, and tested on others by the
protocol of Revisited Oxford and Paris.
"""

import pickle
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.seeds import derive, generator
from omniconv.data.revisited import Query, read_revisited
from omniconv.layers.pool.gem import GeneralizedMeanPool2d
from omniconv.losses.arcface import ArcFaceLoss, cosines
from omniconv.models.factory import create_model
from omniconv.models.image.dolg import DOLG, DOLGConfig, MultiAtrous, OrthogonalFusion
from omniconv.papers.check import Check
from omniconv.tasks.retrieval import Protocol, average_precision, ranking, revisited_map

DESCRIPTOR = 512
ORTHOGONALITY = 1e-6
POOLING_ERROR = 1e-5
MAXIMUM_ERROR = 0.01
OVER_GLOBAL = 3.0
OVER_PLAIN = 0.5
SEEDS = (0, 1, 2)
SCENES = MARKS = 8
UNSEEN = 16
VIEWS = 16
TEST_VIEWS = 8
TEST_QUERIES = 2
EPOCHS = 6
BATCH = 64
LR = 2e-3
CONFIG = DOLGConfig(
    (1, 1, 1, 1), (4, 8, 16, 32), stem="3x3", dilations=(1, 2, 3), atrous_channels=16, descriptor_dim=64
)

Split = tuple[Tensor, Tensor]


class PlainFusion(nn.Module):
    """The global feature beside the local one as it is."""

    def forward(self, local: Tensor, whole: Tensor) -> Tensor:
        """Return the fused map."""
        return torch.cat([whole[:, :, None, None].expand_as(local), local], 1)


class GlobalOnly(nn.Module):
    """The global feature beside zeros."""

    def forward(self, local: Tensor, whole: Tensor) -> Tensor:
        """Return the fused map."""
        return torch.cat([whole[:, :, None, None].expand_as(local), torch.zeros_like(local)], 1)


def _parts(check: Check) -> None:
    random = generator(0, "dolg")
    local = torch.randn(3, 32, 7, 5, generator=random)
    whole = torch.randn(3, 32, generator=random)
    rest = OrthogonalFusion()(local, whole)[:, 32:]
    tiled = whole[:, :, None, None]
    cosine = (rest * tiled).sum(1).abs() / (rest.norm(dim=1) * tiled.norm(dim=1))
    check.require(
        "largest cosine of the orthogonal part with the global feature", cosine.max(), "<", ORTHOGONALITY
    )
    share = (local * tiled).sum(1, keepdim=True) / (tiled * tiled).sum(1, keepdim=True)
    check.require(
        "difference of both parts' sum from the local feature",
        (rest + share * tiled - local).abs().max(),
        "<=",
        1e-5,
    )
    inputs = (local[:1, :4, :2, :2].double().requires_grad_(), whole[:1, :4].double().requires_grad_())
    right = torch.autograd.gradcheck(OrthogonalFusion(), inputs, raise_exception=False)
    check.require("the fusion's gradient is that of finite differences", right, "==", 1)

    x = torch.rand(2, 5, 9, 7, generator=random) + 0.1
    mean = (GeneralizedMeanPool2d(1.0)(x) - x.mean((2, 3))).abs().max()
    check.require("GeM of p = 1 and the average differ by", mean.detach(), "<=", POOLING_ERROR)
    top = GeneralizedMeanPool2d(2000.0).double()(x.double())
    off = (top / x.double().amax((2, 3)) - 1).abs().max()
    check.require("GeM of p = 2000 and the maximum differ by, relatively", off.detach(), "<=", MAXIMUM_ERROR)

    wrong = 0
    block = MultiAtrous(4, 2, (6, 12, 18))
    for conv, dilation in zip(list(block.aspp)[1:], (6, 12, 18), strict=True):
        x = torch.randn(1, 4, 41, 41, generator=random).requires_grad_()
        (gradient,) = torch.autograd.grad(conv(x)[0, :, 20, 20].sum(), x)
        seen = {(i, j) for i, j in gradient[0].abs().sum(0).nonzero().tolist()}
        steps = (-dilation, 0, dilation)
        wrong += seen != {(20 + i, 20 + j) for i in steps for j in steps}
    check.require("dilated branches of 3 that do not see exactly nine pixels", wrong, "==", 0)
    model = create_model("dolg_resnet50", num_classes=0, device="meta")
    check.require(
        "length of DOLG-R50's descriptor",
        model(torch.empty(1, 3, 224, 224, device="meta")).shape[1],
        "==",
        DESCRIPTOR,
    )


def _protocol(check: Check) -> None:
    truth = {"bbx": [0.0, 0.0, 9.0, 9.0], "easy": [0], "hard": [1, 4], "junk": [3]}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "gnd_generated.pkl"
        file.write_bytes(
            pickle.dumps({"imlist": list("abcde"), "qimlist": ["q"], "gnd": [truth]}, protocol=2)
        )
        benchmark = read_revisited(file)
    check.require("a generated ground truth comes back", benchmark.queries[0].hard == (1, 4), "==", 1)
    order = torch.tensor([[3, 0, 1, 2, 4]]).numpy()
    # Ranks without junk: easy (0, 2), hard (1, 2, 4), medium (0, 1, 2, 4); trapezoids by hand.
    hand: dict[Protocol, float] = {
        "easy": 1.0,
        "hard": (1 + (1 / 2 + 2 / 3) / 2) / 2,
        "medium": (2 + (2 / 3 + 3 / 4) / 2) / 3,
    }
    off = max(abs(revisited_map(order, benchmark.queries, kind) - value) for kind, value in hand.items())
    check.require("mean average precisions differ from those by hand by", off, "<=", 1e-12)
    first = average_precision(order[0], torch.tensor([3, 0]).numpy())
    check.require("average precision of a perfect ranking", first, "==", 1)


def landmarks(seed: int) -> tuple[Split, Split]:
    """Return (train, test): pictures (N, 3, 32, 32) of some landmarks, and of others, with their numbers."""
    random = generator(seed, "landmarks")
    scenes = torch.randn(SCENES, 3, 4, 4, generator=random)
    marks = torch.randn(MARKS, 3, 5, 5, generator=random)
    order = torch.randperm(SCENES * MARKS, generator=random)

    def pictures(chosen: Tensor, views: int) -> Split:
        numbers = chosen.repeat_interleave(views)
        images = F.interpolate(scenes[numbers // MARKS], size=(40, 40), mode="bilinear")
        crops = []
        for image, number in zip(images, numbers.tolist(), strict=True):
            y, x, v, u = torch.randint(0, 9, (4,), generator=random).tolist()
            crop = image[:, y : y + 32, x : x + 32].clone()
            crop[:, 3 * v : 3 * v + 5, 3 * u : 3 * u + 5] = marks[number % MARKS]
            crops.append(crop)
        stacked = torch.stack(crops)
        return stacked + 0.3 * torch.randn(stacked.shape, generator=random), numbers

    return pictures(order[UNSEEN:], VIEWS), pictures(order[:UNSEEN], TEST_VIEWS)


def _train(model: DOLG, split: Split, seed: int) -> None:
    images, numbers = split
    _, labels = numbers.unique(return_inverse=True)
    steps = EPOCHS * len(labels) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps, pct_start=0.2)
    loss = ArcFaceLoss(0.15, 30.0)
    random = generator(seed, "train")
    weight = model.get_classifier().get_parameter("weight")
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(labels), (BATCH,), generator=random)
        features = model.forward_head(model.forward_features(images[chosen]), pre_logits=True)
        optimizer.zero_grad(set_to_none=True)
        loss(cosines(features, weight), labels[chosen]).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def _mean_precision(model: DOLG, split: Split) -> float:
    images, numbers = split
    model.eval()
    features = model.forward_head(model.forward_features(images), pre_logits=True).numpy()
    query = torch.arange(len(numbers)) % TEST_VIEWS < TEST_QUERIES
    gallery = numbers[~query]
    queries = tuple(
        Query("", (), tuple((gallery == number).nonzero().flatten().tolist()), (), ())
        for number in numbers[query]
    )
    return 100 * revisited_map(ranking(features[query.numpy()], features[~query.numpy()]), queries)


def _retrieval(check: Check) -> None:
    fusions = {"orthogonal": OrthogonalFusion, "plain": PlainFusion, "global": GlobalOnly}
    scores: dict[str, list[float]] = {kind: [] for kind in fusions}
    for seed in SEEDS:
        known, unseen = landmarks(seed)
        for kind, fusion in fusions.items():
            torch.manual_seed(derive(seed, "weights"))
            model = DOLG(CONFIG, SCENES * MARKS - UNSEEN)
            model.fusion = fusion()
            _train(model, known, seed)
            scores[kind].append(_mean_precision(model, unseen))
    means = {kind: sum(values) / len(values) for kind, values in scores.items()}
    for kind, name, margin in (
        ("global", "the global feature alone", OVER_GLOBAL),
        ("plain", "plain concatenation", OVER_PLAIN),
    ):
        check.require(
            f"mAP with orthogonal fusion minus that of {name}, mean of 3 seeds",
            means["orthogonal"] - means[kind], ">=", margin, baseline=means[kind], unit="points",
        )  # fmt: skip
    check.note("; ".join(f"mAP {kind} {values}" for kind, values in scores.items()))


def run(check: Check) -> None:
    """Measure the parts, the protocol, and a small retrieval."""
    _parts(check)
    _protocol(check)
    _retrieval(check)
