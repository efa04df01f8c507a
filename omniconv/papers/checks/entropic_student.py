"""A small encoder priced in bits sends less than half of the bytes of JPEG, and fewer than any eight-bit bottleneck,
where the server's answers are within two points of the whole network's.

Pictures are those of Fashion-MNIST enlarged to 48 pixels; the teacher is a ResNet of three stages, split behind its
first. Every byte counts: length, header and range-coded latent for the student, whole files with optimised tables for
JPEG, which may also be taken at the pictures' own 28 pixels. The price of a bit at which at most two points are lost is
chosen with one seed on validation images; two further seeds and the test images then decide.
"""

import copy
import io
from itertools import pairwise

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.seeds import derive, generator
from omniconv.deploy.split.distill import distill_head, distill_tail
from omniconv.deploy.split.entropic_student import EntropicBottleneck
from omniconv.deploy.split.network import SplitNetwork, split
from omniconv.deploy.split.wire import SplitDevice, SplitServer
from omniconv.layers.factorized_prior import FactorizedPrior
from omniconv.layers.norm.gdn import GeneralizedDivisiveNorm
from omniconv.models.factory import create_model
from omniconv.ops.range_coder import decode, encode, make_tables
from omniconv.papers.check import Check
from omniconv.papers.small import Split, accuracy, fashion_mnist, train

GDN_ERROR = 1e-6
CODED_SHARE, CODED_BYTES = 0.02, 16
POINTS = 2.0
JPEG_RATIO = 0.5
RISE = 0.0

SIZE, CHANNELS = 48, 6
TEACHER_IMAGES, TEACHER_EPOCHS = 8000, 2
IMAGES, VALIDATION, TEST = 3000, 1000, 1000
EPOCHS = (2, 2)
BATCH, RATE = 16, 3e-3
BETAS = (0.1, 0.4, 1.6)
SEEDS = (0, 1, 2)
QUALITIES = (1, 5, 10, 15, 20, 30, 40, 50, 75, 95)
LAYERS = ("layer1", "layer2", "layer3")
LENGTH = 4  # bytes in front of every message on the wire


def gdn_error() -> float:
    """Return the largest difference of GDN, its inverse and their simplified forms from sums over channels."""
    worst = 0.0
    for simplified in (False, True):
        for inverse in (False, True):
            torch.manual_seed(0)
            layer = GeneralizedDivisiveNorm(5, inverse=inverse, simplified=simplified).double()
            nn.init.normal_(layer.gamma)
            nn.init.normal_(layer.beta)
            x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
            beta, gamma = layer.beta**2 + 1e-6, layer.gamma**2
            y = layer(x)
            for i in range(5):
                pool = beta[i] + sum(
                    gamma[i, j] * (x[:, j].abs() if simplified else x[:, j] ** 2) for j in range(5)
                )
                pool = pool if simplified else pool.sqrt()
                expected = x[:, i] * pool if inverse else x[:, i] / pool
                worst = max(worst, float((y[:, i] - expected).detach().abs().max()))
    return worst


def coder_faults() -> int:
    """Return how many of 20,000 numbers, among them some far outside the tables, come back changed."""
    random = np.random.default_rng(0)
    integers = np.arange(-40, 41)
    mass = np.stack([np.exp(-np.abs(integers - mean) / width) for mean, width in ((0, 0.1), (3, 2), (-9, 8))])
    tables = make_tables(mass / mass.sum(1, keepdims=True) / 1.001, -40)
    rows = random.integers(0, 3, 20000)
    numbers = np.round(random.laplace(0, 4, 20000)).astype(np.int64)
    numbers[::500] = random.integers(-(2**31), 2**31, 40)
    return int((decode(encode(numbers, rows, tables), rows, tables) != numbers).sum())


def to_pixels(images: Tensor) -> Tensor:
    """Return standardised pictures as whole grey levels from 0 to 255."""
    return ((images - images.min()) / (images.max() - images.min()) * 255).round()


def enlarge(pixels: Tensor) -> Tensor:
    """Return grey levels (N, 1, H, W) at the size that the networks take, whole again."""
    return F.interpolate(pixels, size=(SIZE, SIZE), mode="bilinear").round().clamp(0, 255)


def standard(pixels: Tensor) -> Tensor:
    """Return what the networks take of grey levels."""
    return ((pixels / 255 - 0.286) / 0.353).contiguous(memory_format=torch.channels_last)


def jpeg(pixels: Tensor, quality: int) -> tuple[Tensor, float]:
    """Return the decoded pictures and the mean bytes of their files."""
    decoded, sizes = [], []
    for picture in pixels[:, 0].to(torch.uint8).numpy():
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=quality, optimize=True)
        sizes.append(file.tell())
        decoded.append(torch.from_numpy(np.array(Image.open(file))))
    return torch.stack(decoded).float()[:, None], sum(sizes) / len(sizes)


def cheapest_jpeg(teacher: nn.Module, pixels: Tensor, labels: Tensor, wanted: float) -> tuple[float, str]:
    """Return the fewest bytes at which the teacher answers well enough from decoded pictures, and how."""
    best, how = float("inf"), "none"
    for size, pictures in ((SIZE, enlarge(pixels)), (pixels.shape[-1], pixels)):
        for quality in QUALITIES:
            decoded, count = jpeg(pictures, quality)
            if count >= best:
                break
            if size != SIZE:
                decoded = enlarge(decoded)
            if accuracy(teacher, (standard(decoded), labels)) >= wanted:
                best, how = count, f"{size} pixels, quality {quality}"
                break
    return best, how


def sent_bytes(student: SplitNetwork, images: Tensor) -> list[int]:
    """Return the bytes on the wire of each image."""
    return [LENGTH + len(message) for part in images.split(500) for message in student.encode(part)]


def make_teacher(images: Split) -> nn.Module:
    """Return the trained whole network."""
    torch.manual_seed(derive(0, "weights"))
    model = create_model(
        "resnet18", num_classes=10, in_chans=1, depths=(1, 1, 1), widths=(16, 32, 64)
    ).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  # fmt: skip
    train(model, images, epochs=TEACHER_EPOCHS, batch=32, shift=1)
    return model.eval()


def batches(images: Split, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Return shuffled batches."""
    order = torch.randperm(len(images[1]), generator=generator(seed, "order"))
    return [(images[0][chosen], images[1][chosen]) for chosen in order.split(BATCH)]


def make_student(
    teacher: nn.Module, images: Split, beta: float, seed: int
) -> tuple[SplitNetwork, SplitNetwork]:
    """Return the student after the first stage and after the second."""
    torch.manual_seed(derive(seed, "student"))
    student = split(teacher, "layer1", EntropicBottleneck(CHANNELS), images[0][:1])
    student = student.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    data = batches(images, seed)
    distill_head(student, teacher, [x for x, _ in data], layers=LAYERS, beta=beta, epochs=EPOCHS[0], lr=RATE)
    first = copy.deepcopy(student)
    distill_tail(student, teacher, data, epochs=EPOCHS[1], lr=RATE)
    return first, student


@torch.no_grad()
def coding_excess(student: SplitNetwork, images: Tensor) -> float:
    """Return the most bytes that an image's code takes beyond its estimated entropy and the allowed share of it."""
    latent = student.encoder(images)
    prior = student.codec
    assert isinstance(prior, FactorizedPrior)
    estimated = prior(latent).flatten(1).sum(1) / 8
    coded = torch.tensor([len(message) for message in prior.compress(latent)])
    return float((coded - (1 + CODED_SHARE) * estimated).max())


def table_faults(student: SplitNetwork) -> int:
    """Return how many channels' frequencies do not rise strictly from 0 to 2^16."""
    codec: FactorizedPrior = student.codec  # type: ignore[assignment]
    good = 0
    for cdf, size in zip(codec.cdfs.tolist(), codec.sizes.tolist(), strict=True):
        used = cdf[: size + 1]
        rises = all(a < b for a, b in pairwise(used))
        good += used[0] == 0 and used[-1] == 1 << 16 and rises
    return codec.channels - good


def run(check: Check) -> None:
    """Measure the parts, then rate and accuracy."""
    check.require("difference of GDN from its formula", gdn_error(), "<=", GDN_ERROR)
    check.require("numbers that the range coder changes, of 20,000", coder_faults(), "==", 0)

    (x, y), (tx, ty) = fashion_mnist(TEACHER_IMAGES + VALIDATION, TEST)
    x, tx = to_pixels(x), to_pixels(tx)
    images, test = (standard(enlarge(x)), y), (standard(enlarge(tx)), ty)
    learned = images[0][:TEACHER_IMAGES], images[1][:TEACHER_IMAGES]
    validation = images[0][TEACHER_IMAGES:], images[1][TEACHER_IMAGES:]
    some = images[0][:IMAGES], images[1][:IMAGES]
    teacher = make_teacher(learned)
    whole, whole_validation = accuracy(teacher, test), accuracy(teacher, validation)

    students = {beta: make_student(teacher, some, beta, SEEDS[0]) for beta in BETAS}
    rates = [float(np.mean(sent_bytes(students[beta][1], test[0]))) for beta in BETAS]
    falls = sum(dear < cheap for cheap, dear in pairwise(rates))
    check.require("steps of the price of a bit at which fewer bytes are sent", falls, "==", len(BETAS) - 1)
    good = [b for b in BETAS if accuracy(students[b][1], validation) >= whole_validation - POINTS]
    beta = max(good, default=min(BETAS))
    chosen = [students[beta], *(make_student(teacher, some, beta, seed) for seed in SEEDS[1:])]

    scores = [accuracy(student, test) for _, student in chosen]
    counts = [sent_bytes(student, test[0]) for _, student in chosen]
    mean, count = float(np.mean(scores)), float(np.mean(counts))
    check.require(
        "accuracy lost by the student, mean of 3 seeds",
        whole - mean,
        "<=",
        POINTS,
        baseline=whole,
        unit="points",
    )
    best, how = cheapest_jpeg(teacher, tx, ty, whole - POINTS)
    check.require(
        "bytes on the wire over those of JPEG at which as much is lost",
        count / best,
        "<=",
        JPEG_RATIO,
        baseline=best,
    )
    with torch.no_grad():
        rows = teacher.get_submodule("maxpool")(teacher.get_submodule("conv1")(test[0][:1])).shape[-1]
    # What an eight-bit bottleneck of a single channel sends, whatever its accuracy: length, header, scale and map.
    eight = LENGTH + 4 + 8 + (rows + 4) ** 2
    check.require(
        "bytes on the wire over those of an eight-bit bottleneck of one channel",
        count / eight,
        "<=",
        1.0,
        baseline=eight,
    )

    changed = sum(
        a != b
        for (first, _), after in zip(chosen, counts, strict=True)
        for a, b in zip(sent_bytes(first, test[0]), after, strict=True)
    )
    check.require("images whose bytes the second stage changes", changed, "==", 0)
    before = float(np.mean([accuracy(first, test) for first, _ in chosen]))
    check.require(
        "accuracy gained by the second stage, mean of 3 seeds",
        mean - before,
        ">",
        RISE,
        baseline=before,
        unit="points",
    )
    student = chosen[0][1]
    check.require("channels whose frequencies do not rise from 0 to 2^16", table_faults(student), "==", 0)
    excess = coding_excess(student, test[0][:500])
    check.require(
        "bytes of an image's code beyond 1.02 times its entropy, the most of 500", excess, "<=", CODED_BYTES
    )

    with SplitServer(student) as server, SplitDevice(student, server.address) as device:
        answers = device(test[0][:100])
        same = sum(
            answer is not None and answer[0].argmax() == wanted
            for answer, wanted in zip(answers, student(test[0][:100]).argmax(1).tolist(), strict=True)
        )
        check.require("answers over a socket that are those without one, of 100", same, "==", 100)
        check.require(
            "bytes received less those counted", server.received_bytes - sum(counts[0][:100]), "==", 0
        )
    report = student.report(test[0][:1])
    check.note(
        f"teacher {whole:.1f}%; students {[f'{s:.1f}' for s in scores]} at price {beta:g}, {count:.0f} bytes an image; "
        f"bytes at prices {BETAS}: {[round(r) for r in rates]}; JPEG needs {best:.0f} ({how}); "
        f"encoder {report.device_parameters:,} parameters, {report.device_macs:,} multiply-adds"
    )
