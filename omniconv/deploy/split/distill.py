"""How a split network learns from the whole one: its features first, then its answers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.deploy.split.network import SplitNetwork

__all__ = ["Batches", "distill_head", "distill_tail", "feature_errors", "rate"]


class Batches(Protocol):
    """Batches that are passed over once an epoch, and whose number is known."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...


@contextmanager
def _recorded(modules: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Collect what modules put out while the block runs."""
    found: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, module in modules.items():

            def keep(_module: nn.Module, _inputs: Any, output: Tensor, name: str = name) -> None:
                found[name] = output

            stack.callback(module.register_forward_hook(keep).remove)
        yield found


def rate(student: SplitNetwork, latent: Tensor) -> Tensor:
    """Return the bits of an image's quantised latent by the student's density, on average."""
    bits: Callable[[Tensor], Tensor] = student.codec.bits  # type: ignore[assignment]  # of an entropy model
    return bits(latent).sum() / len(latent)


def feature_errors(
    student: SplitNetwork, teacher: nn.Module, images: Tensor, layers: Sequence[str]
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the squared error of each layer's output, summed over an image, and the quantised latent.

    Args:
        student: of `split`.
        teacher: the network that was split.
        images: (N, C, H, W).
        layers: names in the teacher. The first is the layer that was replaced; the others follow it.
    """
    places = {
        layer: student.decoder if index == 0 else student.tail.get_submodule(layer)
        for index, layer in enumerate(layers)
    }
    with torch.no_grad(), _recorded({name: teacher.get_submodule(name) for name in layers}) as wanted:
        teacher(images)
    latent: Tensor = student.codec.quantise(student.encoder(student.stem(images)))  # type: ignore[operator]
    with _recorded(places) as found:
        replaced = student.decoder(latent)
        if len(layers) > 1:
            student.tail(replaced)
    return {
        name: F.mse_loss(found[name], wanted[name], reduction="sum") / len(images) for name in layers
    }, latent


@contextmanager
def _only_training(student: SplitNetwork, teacher: nn.Module, parts: Sequence[nn.Module]) -> Iterator[None]:
    """Let `parts` learn and nothing else, and put everything back in eval mode."""
    kept = [(p, p.requires_grad) for p in student.parameters()]
    mode = teacher.training
    student.eval().requires_grad_(False)
    teacher.eval()
    for part in parts:
        part.train().requires_grad_(True)
    try:
        yield
    finally:
        student.eval()
        teacher.train(mode)
        for parameter, needed in kept:
            parameter.requires_grad_(needed)


def _train(
    parts: Sequence[nn.Module], batches: Batches, loss: Callable[[Any], Tensor], epochs: int, lr: float
) -> list[float]:
    """Minimise with Adam; the rate falls to zero as a cosine over all steps."""
    if not len(batches) or epochs < 1:
        raise ValueError(f"there must be a batch and an epoch: got {len(batches)} and {epochs}")
    optimizer = torch.optim.Adam([p for part in parts for p in part.parameters()], lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(batches))
    means = []
    for _ in range(epochs):
        losses = []
        for batch in batches:
            value = loss(batch)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
            schedule.step()
            losses.append(value.item())
        means.append(sum(losses) / len(losses))
    return means


def distill_head(
    student: SplitNetwork,
    teacher: nn.Module,
    batches: Batches,
    *,
    layers: Sequence[str],
    beta: float = 0.0,
    epochs: int = 10,
    lr: float = 1e-3,
) -> list[float]:
    r"""Train encoder, codec and decoder so that the student's features become the teacher's, and few bits are needed.

    .. math:: \sum_l \lVert h_l - h_l^\mathrm{teacher} \rVert^2 + \beta\, R

    With one layer it is head network distillation, with several its generalised form; :math:`\beta` adds the bits R
    of the latent, with noise for rounding. Labels are not needed. Everything else stays as it is.

    Args:
        student: of `split`; trained in place, and left in eval mode with its coding tables renewed.
        teacher: the network that was split.
        batches: of images (N, C, H, W), passed over once an epoch: a list or a `DataLoader`.
        layers: names in the teacher. The first is the layer that was replaced; the others follow it.
        beta: :math:`\beta`, price of a bit; 0 for codecs without a density.
        epochs: passes over the batches.
        lr: of Adam at the start; it falls to zero as a cosine.

    Returns:
        The mean loss of every epoch.

    Raises:
        ValueError: if there is no batch or no epoch.
    """
    parts = (student.encoder, student.codec, student.decoder)

    def loss(images: Tensor) -> Tensor:
        errors, latent = feature_errors(student, teacher, images, layers)
        distortion = torch.stack(list(errors.values())).sum()
        return distortion + beta * rate(student, latent) if beta else distortion

    with _only_training(student, teacher, parts):
        means = _train(parts, batches, loss, epochs, lr)
    if hasattr(student.codec, "update"):
        student.codec.update()  # type: ignore[operator]
    return means


def distill_tail(
    student: SplitNetwork,
    teacher: nn.Module,
    batches: Batches,
    *,
    epochs: int = 10,
    lr: float = 1e-3,
    alpha: float = 0.5,
    temperature: float = 1.0,
) -> list[float]:
    r"""Train decoder and tail of a classifier on the frozen encoder's rounded latents, from labels and the teacher.

    .. math:: \alpha\, \mathrm{CE}(z, y) + (1 - \alpha)\, T^2\, \mathrm{KL}(\sigma(z_t / T) \,\|\, \sigma(z / T))

    What the device sends does not change, so one encoder can serve the tails of several tasks.

    Args:
        student: of `split`, its head distilled; trained in place, and left in eval mode.
        teacher: the network that was split; gives logits.
        batches: of images and labels, passed over once an epoch: a list or a `DataLoader`.
        epochs: passes over the batches.
        lr: of Adam at the start; it falls to zero as a cosine.
        alpha: :math:`\alpha`, weight of the labels.
        temperature: T.

    Returns:
        The mean loss of every epoch.

    Raises:
        ValueError: if there is no batch or no epoch.
    """
    parts = (student.decoder, student.tail)

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        logits = student(images)
        with torch.no_grad():
            soft = (teacher(images) / temperature).softmax(1)
        distance = F.kl_div((logits / temperature).log_softmax(1), soft, reduction="batchmean")
        return alpha * F.cross_entropy(logits, labels) + (1 - alpha) * temperature**2 * distance

    with _only_training(student, teacher, parts):
        return _train(parts, batches, loss, epochs, lr)
