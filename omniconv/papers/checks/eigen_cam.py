"""Eigen-CAM's map is the projection on the first principal component of a layer's activations: the best
approximation of rank one, independent of the classifier, steadier than Grad-CAM when noise flips the label.

Pictures for the last part: a handwritten digit, enlarged to 16 to 32 pixels, on 64 x 64 pixels of clutter cut
from other digits. A small plain network is trained for about 30 seconds with each of three seeds. A box is
right when its IoU with the digit's is at least 0.5. The attack is one FGSM step, of the smallest of five
sizes that flips at least half of the right answers; rates before and after it are of the flipped pictures.
"""

from collections import OrderedDict

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.seeds import generator
from omniconv.inspect.cam.eigen_cam import eigen_cam, principal_map
from omniconv.inspect.cam.grad_cam import grad_cam
from omniconv.inspect.cam.grad_cam_pp import grad_cam_pp
from omniconv.inspect.cam.localise import box_iou, boxes
from omniconv.papers import small
from omniconv.papers.check import Check

EXACT = 1e-5  # of the map's largest value
UNCHANGED = 1e-6
GRAD_CAM_CHANGES = 0.1  # mean absolute difference of maps in [0, 1]
CORRELATION = 0.999
DROP = 10.0  # points
SEEDS = (0, 1, 2)
STEPS = (0.01, 0.02, 0.04, 0.08, 0.16)  # of the range of pixel values
BOX_THRESHOLD = 0.2  # of the map's maximum
EPOCHS = 8
LAYER = "features"


def _svd_map(activation: Tensor) -> Tensor:
    o = activation.flatten(2).transpose(1, 2).double()
    _, _, vt = torch.linalg.svd(o, full_matrices=False)
    projection = (o @ vt[:, :1].transpose(1, 2))[..., 0]
    return _positive(projection).unflatten(1, activation.shape[2:])


def _power_map(activation: Tensor, rounds: int = 3000) -> Tensor:
    o = activation.flatten(2).transpose(1, 2).double()
    v = torch.ones(len(o), o.shape[2], 1, dtype=torch.double)
    for _ in range(rounds):
        v = F.normalize(o.transpose(1, 2) @ (o @ v), dim=1)
    return _positive((o @ v)[..., 0]).unflatten(1, activation.shape[2:])


def _positive(projection: Tensor) -> Tensor:
    energy = (projection * projection.abs()).sum(1, keepdim=True)
    return torch.where(energy < 0, -projection, projection).relu()


def _algebra(check: Check) -> None:
    svd, power, rank_one = 0.0, 0.0, []
    for trial, (channels, height, width) in enumerate([(24, 9, 7), (96, 5, 6), (17, 13, 11), (64, 4, 4)]):
        random = generator(trial, "activations")
        activation = torch.randn(4, channels, height, width, generator=random).relu()
        ours = principal_map(activation)
        for reference, name in ((_svd_map(activation), "svd"), (_power_map(activation), "power")):
            error = float((ours - reference).abs().max() / reference.max())
            svd, power = (max(svd, error), power) if name == "svd" else (svd, max(power, error))
        # A pattern over the positions times a pattern over the channels, with and without noise.
        where = torch.rand(1, 1, height, width, generator=random)
        planted = where * torch.rand(1, channels, 1, 1, generator=random)
        noise = torch.randn(planted.shape, generator=random) * planted.norm() / planted.numel() ** 0.5
        for share in (0.0, 0.01):
            found = principal_map(planted + share * noise)
            rank_one.append(float(np.corrcoef(found.flatten(), where.flatten())[0, 1]))
    check.require("largest difference from torch.linalg.svd", svd, "<=", EXACT)
    check.require("largest difference from power iteration", power, "<=", EXACT)
    check.require("correlation with a planted pattern of rank one", min(rank_one), ">", CORRELATION)


def _class_independence(check: Check, model: nn.Module, x: Tensor) -> None:
    classifier = model.get_submodule("fc")
    assert isinstance(classifier, nn.Linear)
    kept = classifier.weight.detach().clone()
    eigen, grad = eigen_cam(model, x, LAYER).data["map"], grad_cam(model, x, 3, LAYER).data["map"]
    changes = []
    with torch.no_grad():
        permuted = kept.roll(1, 0)
        replaced = torch.randn(kept.shape, generator=generator(0, "head")) * kept.std()
        for weight in (permuted, replaced):
            classifier.weight.copy_(weight)
            other_eigen, other_grad = (
                eigen_cam(model, x, LAYER).data["map"],
                grad_cam(model, x, 3, LAYER).data["map"],
            )
            changes.append((np.abs(other_eigen - eigen).max(), np.abs(other_grad - grad).mean()))
        classifier.weight.copy_(kept)
    check.require(
        "change of Eigen-CAM under a permuted or replaced classifier",
        max(c[0] for c in changes),
        "<=",
        UNCHANGED,
    )
    check.require(
        "mean change of Grad-CAM under the same", min(c[1] for c in changes), ">=", GRAD_CAM_CHANGES
    )


def _pictures(count: int, seed: int, part: int) -> tuple[Tensor, Tensor, np.ndarray]:
    """Return images (N, 1, 64, 64) in [0, 1], labels and the digits' boxes."""
    glyphs, labels = small.digits()[part]
    glyphs = (glyphs - glyphs.min()) / (glyphs.max() - glyphs.min())
    random = generator(seed, "pictures", part)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=random))

    images, targets = torch.zeros(count, 1, 64, 64), torch.zeros(count, dtype=torch.long)
    truth = np.zeros((count, 4), np.int64)
    for index in range(count):
        for _ in range(8):
            piece = F.interpolate(glyphs[draw(0, len(glyphs))][None], scale_factor=3.0, mode="bilinear")[
                0, :, 8:16, 8:16
            ]
            y, x = draw(0, 56), draw(0, 56)
            area = images[index, :, y : y + 8, x : x + 8]
            area.copy_(torch.maximum(area, piece))
        which, side = draw(0, len(glyphs)), draw(16, 33)
        glyph = F.interpolate(glyphs[which][None], size=(side, side), mode="bilinear")[0]
        y, x = draw(0, 65 - side), draw(0, 65 - side)
        area = images[index, :, y : y + side, x : x + side]
        area.copy_(torch.maximum(area, glyph))
        ink = (glyph[0] > 0.2).nonzero().numpy()
        (top, left), (bottom, right) = ink.min(0), ink.max(0) + 1
        targets[index] = labels[which]
        truth[index] = x + left, y + top, x + right, y + bottom
    return images, targets, truth


def _network() -> nn.Module:
    """Return four convolutions, the last map a quarter of the picture's size, and a linear classifier."""

    def block(inputs: int, outputs: int, kernel: int, stride: int) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]

    layers = [*block(1, 24, 5, 2), *block(24, 48, 3, 2), *block(48, 64, 3, 1), *block(64, 64, 3, 1)]
    network = {"features": nn.Sequential(*layers), "pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    return nn.Sequential(OrderedDict(network | {"fc": nn.Linear(64, 10)}))


def _fgsm(model: nn.Module, images: Tensor, labels: Tensor, step: float) -> Tensor:
    x = images.clone().requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(model(x), labels), x)
    return (images + step * slope.sign()).clamp(0, 1)


def _attack(model: nn.Module, images: Tensor, labels: Tensor, right: Tensor) -> tuple[float, Tensor, Tensor]:
    """Return the step, the attacked images and which right answers it flips."""
    step, attacked, flipped = 0.0, images, torch.zeros_like(right)
    for step in STEPS:
        attacked = _fgsm(model, images, labels, step)
        with torch.no_grad():
            flipped = right & (model(attacked).argmax(1) != labels)
        if flipped.sum() >= right.sum() / 2:
            break
    return step, attacked, flipped


def _rate(maps: np.ndarray, truth: np.ndarray) -> float:
    return 100 * float((box_iou(boxes(maps, BOX_THRESHOLD), truth) >= 0.5).mean())


def _localisation(check: Check) -> nn.Module:
    methods = {"Eigen-CAM": eigen_cam, "Grad-CAM": grad_cam, "Grad-CAM++": grad_cam_pp}
    before: dict[str, list[float]] = {name: [] for name in methods}
    after: dict[str, list[float]] = {name: [] for name in methods}
    clean: dict[str, list[float]] = {name: [] for name in methods}
    centred, model = [], nn.Module()
    for seed in SEEDS:
        images, labels, _ = _pictures(3000, seed, 0)
        torch.manual_seed(seed)
        model = _network()
        small.train(model, (images, labels), epochs=EPOCHS, batch=64, seed=seed, flip=False)
        model.eval()
        images, labels, truth = _pictures(400, seed, 1)
        with torch.no_grad():
            right = model(images).argmax(1) == labels
        step, attacked, flipped = _attack(model, images, labels, right)
        check.note(
            f"seed {seed}: {100 * float(right.float().mean()):.1f}% right; a step of {step} flips "
            f"{int(flipped.sum())} of {int(right.sum())} right answers"
        )
        chosen = flipped.numpy()
        for name, method in methods.items():
            clean[name].append(_rate(method(model, images, layer=LAYER).data["map"], truth))
            before[name].append(_rate(method(model, images[flipped], layer=LAYER).data["map"], truth[chosen]))
            after[name].append(
                _rate(method(model, attacked[flipped], layer=LAYER).data["map"], truth[chosen])
            )
        side = round(float((truth[:, 2:] - truth[:, :2]).mean()))
        middle = np.tile([32 - side // 2, 32 - side // 2, 32 + side // 2, 32 + side // 2], (len(truth), 1))
        centred.append(100 * float((box_iou(middle, truth) >= 0.5).mean()))

    def mean(values: dict[str, list[float]], name: str) -> float:
        return float(np.mean(values[name]))

    for name in methods:
        check.note(
            f"{name}: boxes with IoU >= 0.5: {mean(clean, name):.1f}% of all test pictures; of the flipped "
            f"{mean(before, name):.1f}% before and {mean(after, name):.1f}% after the attack"
        )
    drop = {name: mean(before, name) - mean(after, name) for name in methods}
    check.require(
        "Eigen-CAM's boxes beat a box of the mean size in the middle of every picture",
        mean(clean, "Eigen-CAM"), ">", float(np.mean(centred)), baseline=float(np.mean(centred)), unit="%",
    )  # fmt: skip
    check.require(
        "drop of Eigen-CAM's rate when FGSM flips the label", drop["Eigen-CAM"], "<", DROP,
        baseline=drop["Grad-CAM"], unit="points",
    )  # fmt: skip
    check.require(
        "that drop against Grad-CAM's", drop["Eigen-CAM"], "<", drop["Grad-CAM"],
        baseline=drop["Grad-CAM"], unit="points",
    )  # fmt: skip
    return model


def run(check: Check) -> None:
    """Measure the algebra on drawn activations, then train, localise and attack."""
    _algebra(check)
    model = _localisation(check)
    images, _, _ = _pictures(32, 0, 1)
    _class_independence(check, model, images)
