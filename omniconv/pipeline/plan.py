"""From data, budget and hardware to a plan: which network, at which resolution, trained how.

Speed is measured on this machine, never assumed. The largest candidate that still gets enough epochs within
the time is taken; every decision is written down as a reason.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from omniconv.core.units import bytes_text, seconds_text
from omniconv.data.augment import AugmentConfig
from omniconv.data.schema import Schema
from omniconv.deploy.accelerate import accelerate, bears_channels_last
from omniconv.design.cost import count_cost
from omniconv.models.factory import create_model
from omniconv.pipeline.config import FitConfig, Plan

__all__ = ["Symmetry", "make_plan"]

DEFAULT_SECONDS = 600.0
SMALL_PIXELS = 64
# What loading, augmentation, the optimizer and validation add to forward and backward passes.
OVERHEAD = 1.25
# From the cheapest to the dearest; the planner takes the dearest that the budget can train.
SMALL_NETWORKS = ("resnet8_small", "resnet10_small", "resnet14_small", "resnet18_small")
LARGE_NETWORKS = (
    "mobilenetv2_050", "resnet10t", "mobilenetv2_100", "resnet18d", "efficientnet_b0", "resnet34d",
    "resnet50d", "convnext_tiny",
)  # fmt: skip


@dataclass(frozen=True)
class Symmetry:
    """Accuracy of a linear model on held-out pictures, and on the same pictures mirrored.

    Where mirroring costs the linear model much, mirrored pictures are not pictures of the same world.
    """

    plain: float
    horizontal: float
    vertical: float

    @property
    def flip_horizontal(self) -> bool:
        """Whether left and right can be exchanged."""
        return self.horizontal >= 0.9 * self.plain

    @property
    def flip_vertical(self) -> bool:
        """Whether up and down can be exchanged."""
        return self.vertical >= 0.95 * self.plain


@dataclass(frozen=True)
class Candidate:
    """A network at a resolution, and what it costs here."""

    network: str
    size: int
    seconds_per_image: float
    precision: str
    parameters: int


def _train_step_seconds(model: nn.Module, x: torch.Tensor, precision: str, rounds: int = 3) -> float:
    """Return the fastest of `rounds` forward and backward passes after one to warm up."""
    target = torch.zeros(len(x), dtype=torch.long, device=x.device)
    best = float("inf")
    for number in range(rounds + 1):
        began = time.perf_counter()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            outputs = model(x)
        nn.functional.cross_entropy(outputs.float(), target).backward()
        model.zero_grad(set_to_none=True)
        if x.device.type == "cuda":
            torch.cuda.synchronize()
        if number:
            best = min(best, time.perf_counter() - began)
    return best


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    # Without the instructions bfloat16 is emulated and always slower; the timing would say so, but slowly.
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def measure(network: str, size: int, channels: int, outputs: int, device: torch.device) -> Candidate:
    """Time training of a network on this machine, in both precisions where it has both."""
    with torch.random.fork_rng(devices=[]):
        model = create_model(network, num_classes=outputs, in_chans=channels, device=device)
        batch = max(4, min(64, 3_000_000 // (size * size * 12)))
        x = torch.randn(batch, channels, size, size, device=device)
        if bears_channels_last(model):
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            x = x.contiguous(memory_format=torch.channels_last)
        model = accelerate(model)
        times = {"float32": _train_step_seconds(model, x, "float32")}
        if _has_bfloat16(device):
            times["bfloat16"] = _train_step_seconds(model, x, "bfloat16")
    # A lower precision must earn its place.
    precision = "bfloat16" if times.get("bfloat16", float("inf")) < 0.9 * times["float32"] else "float32"
    parameters = sum(p.numel() for p in model.parameters())
    return Candidate(network, size, times[precision] / batch, precision, parameters)


def choose_size(schema: Schema) -> int:
    """Return the training resolution for the data's median size."""
    longer, shorter = max(schema.height, schema.width), min(schema.height, schema.width)
    if longer <= SMALL_PIXELS:
        return max(16, longer)
    return min(224, max(SMALL_PIXELS, shorter // 32 * 32))


def needed_size(network: str, size: int) -> int:
    """Return the resolution, `size` or more, at which a network's last map has 4 x 4 pixels, or 2 x 2 if it is deep."""
    reduction = create_model(network, device="meta").feature_info.reduction()[-1]
    return max(size, 2 * reduction, min(32, 4 * reduction))


def wanted_epochs(count: int) -> int:
    """Return how many epochs a training set of `count` pictures should get before a larger network pays."""
    return max(12, min(60, 300_000 // max(1, count)))


def _augment(
    small: bool, schema: Schema, symmetry: Symmetry | None, count: int, epochs: int
) -> AugmentConfig:
    """Return what the data can stand: mirrors by test, the rest by resolution and length of training."""
    # Strong augmentation needs many steps to pay; on few it only hides what there is to learn.
    long = epochs >= 30 and count * epochs >= 100_000
    return AugmentConfig(
        flip_horizontal=symmetry.flip_horizontal if symmetry else False,
        flip_vertical=symmetry.flip_vertical if symmetry else False,
        crop="pad" if small else "resized",
        crop_padding=0.125,
        crop_scale=0.35 if long else 0.5,
        color=0.3 if schema.channels == 3 and not small else 0.0,
        auto="trivial" if long and not small and schema.channels == 3 else "none",
        mixup=0.2 if long and schema.task == "classification" and not small else 0.0,
        cutmix=1.0 if long and schema.task == "classification" and not small else 0.0,
        erase=0.25 if count >= 2000 else 0.0,
        rotate=10.0 if count < 5000 else 0.0,
    )


def make_plan(
    schema: Schema,
    count: int,
    outputs: int,
    config: FitConfig,
    *,
    device: torch.device,
    symmetry: Symmetry | None = None,
    latency: Callable[[str, int], float] | None = None,
) -> Plan:
    """Return the plan for `count` training pictures.

    Args:
        schema: of the data.
        count: training pictures.
        outputs: of the network.
        config: what was asked. Its budgets are kept; where no network meets one, the nearest is planned and a
            reason says so.
        device: where training runs.
        symmetry: how a linear model takes mirrored pictures; no flips without it.
        latency: seconds that the exported form of (network, size) takes for one picture; needed with
            `config.latency`.
    """
    size = choose_size(schema)
    small = size <= SMALL_PIXELS
    names = list(SMALL_NETWORKS if small else LARGE_NETWORKS)
    if config.model:
        names, size = [config.model], needed_size(config.model, size)
    reasons = [
        f"pictures are about {schema.width} x {schema.height} pixels; the network sees {size} x {size}"
    ]
    pairs = [(name, size) for name in names]
    if config.bytes:
        pairs = _small_enough(pairs, schema, outputs, config.bytes, reasons)
    if config.latency:
        assert latency is not None
        pairs = _fast_enough(pairs, small, config.latency, latency, reasons)

    seconds = config.seconds or (None if config.epochs else DEFAULT_SECONDS)
    enough = min(config.epochs, wanted_epochs(count)) if config.epochs else wanted_epochs(count)
    chosen: Candidate | None = None
    for name, pixels in pairs:
        candidate = measure(name, pixels, schema.channels, outputs, device)
        per_epoch = candidate.seconds_per_image * count * OVERHEAD
        speed = f"{name}: {1 / candidate.seconds_per_image:.0f} pictures/s in training here"
        if chosen is not None and seconds is not None and per_epoch * enough > seconds:
            reasons.append(f"{speed}, too slow for {enough} epochs in {seconds_text(seconds)}")
            break
        # Without a limit on time, a dataset of this size sets one: small sets do not fill large networks.
        if chosen is not None and candidate.parameters > max(300_000, 100 * count):
            reasons.append(f"{name} has {candidate.parameters:,} parameters, too many for {count:,} pictures")
            break
        chosen = candidate
        reasons.append(speed)
    assert chosen is not None
    reasons.append(f"{chosen.network} is the largest that fits the data and the time")
    if chosen.precision == "bfloat16":
        reasons.append("bfloat16 was measured to be faster than float32 here")

    per_epoch = chosen.seconds_per_image * count * OVERHEAD
    if config.epochs:
        epochs = config.epochs
    else:
        assert seconds is not None
        # A time that was asked for is used, until the patience of the recipe ends it.
        most = 300 if config.seconds else max(40, min(60, 1_500_000 // count))
        epochs = int(max(1, min(seconds / per_epoch, most)))
        reasons.append(f"{epochs} epochs of about {seconds_text(per_epoch)}")
    if symmetry is not None:
        reasons.append(
            f"a linear model gets {symmetry.plain:.0%} of held-out pictures right, "
            f"{symmetry.horizontal:.0%} of them mirrored left to right and {symmetry.vertical:.0%} upside down: "
            f"{'mirrored' if symmetry.flip_horizontal else 'no mirrored'} training pictures"
        )
    plan = _recipe(
        chosen, schema, count, epochs, seconds if config.seconds else None, symmetry, small, reasons
    )
    if config.pretrained is None:
        return plan
    reasons.append("trained weights to start from: a tenth of the learning rate")
    return plan.model_copy(update={"lr": plan.lr / 10, "reasons": tuple(reasons)})


def _recipe(
    chosen: Candidate,
    schema: Schema,
    count: int,
    epochs: int,
    seconds: float | None,
    symmetry: Symmetry | None,
    small: bool,
    reasons: list[str],
) -> Plan:
    batch = 16 if count < 400 else 32 if count < 1500 else 64 if count < 6000 else 128
    batch = min(batch, 1 << max(0, count.bit_length() - 2))
    residual = chosen.network.startswith(("resnet", "repvgg"))
    steps = epochs * max(1, count // batch)
    return Plan(
        network=chosen.network,
        size=chosen.size,
        batch=batch,
        epochs=epochs,
        precision="bfloat16" if chosen.precision == "bfloat16" else "float32",
        # Residual networks with batch norm reach more with momentum SGD, the others with AdamW.
        optimizer="sgd" if residual else "adamw",
        lr=0.2 * batch / 128 if residual else 2e-3 * (batch / 128) ** 0.5,
        weight_decay=5e-4 if residual else 0.05,
        warmup=0.2 if residual else 0.1,
        ema=min(0.999, 1 - 10 / max(20, steps) ** 0.8),
        smoothing=0.1 if schema.task == "classification" else 0.0,
        patience=max(20, epochs // 3) if epochs > 30 else 0,
        augment=_augment(small, schema, symmetry, count, epochs),
        seconds=seconds,
        reasons=tuple(reasons),
    )


def _small_enough(
    pairs: list[tuple[str, int]], schema: Schema, outputs: int, limit: int, reasons: list[str]
) -> list[tuple[str, int]]:
    """Keep the networks whose exported weights fit `limit`."""
    sizes = {}
    for name, size in pairs:
        model = create_model(name, num_classes=outputs, in_chans=schema.channels, device="meta")
        # Four bytes a weight, and the graph with its names.
        sizes[name] = 4 * count_cost(model, (schema.channels, size, size)).parameters + 100_000
    fitting = [pair for pair in pairs if sizes[pair[0]] <= limit]
    if not fitting:
        smallest = min(pairs, key=lambda pair: sizes[pair[0]])
        reasons.append(
            f"no network fits {bytes_text(limit)} in float32; the smallest, {smallest[0]}, takes "
            f"{bytes_text(sizes[smallest[0]])} and is trained"
        )
        return [smallest]
    reasons.append(f"{len(fitting)} of {len(pairs)} networks fit {bytes_text(limit)}")
    return fitting


def _fast_enough(
    pairs: list[tuple[str, int]],
    small: bool,
    limit: float,
    latency: Callable[[str, int], float],
    reasons: list[str],
) -> list[tuple[str, int]]:
    """Keep the networks that take at most `limit`, at lower resolution if none does otherwise.

    If none does at all, the fastest is kept: int8 may bring it below, and how well it does is worth knowing.
    """
    measured: dict[tuple[str, int], float] = {}
    scales = (1.0,) if small else (1.0, 0.75, 0.5)
    for scale in scales:
        fitting = []
        for name, size in pairs:
            pixels = size if scale == 1 else max(32, int(size * scale) // 16 * 16)
            measured[name, pixels] = latency(name, pixels)
            # What is measured on the trained network must meet the limit too, so a tenth is kept in hand.
            if measured[name, pixels] <= 0.9 * limit:
                fitting.append((name, pixels))
        if fitting:
            reasons.append(
                f"{len(fitting)} of {len(pairs)} networks take at most {seconds_text(limit)} a picture"
            )
            return fitting
    (name, pixels), fastest = min(measured.items(), key=lambda item: item[1])
    reasons.append(
        f"no network takes at most {seconds_text(limit)} a picture in float32; the fastest, {name} at "
        f"{pixels} pixels, takes {seconds_text(fastest)} and is trained"
    )
    return [(name, pixels)]
