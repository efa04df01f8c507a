"""The fair comparison of token mixers: one network, one recipe, one small data set (paper 189).

What is measured of each mixer: parameters, multiply-adds, speed, how far it sees, how steady its answers are, and how
often they are right.
"""

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from omniconv.core.seeds import derive
from omniconv.design.cost import count_cost
from omniconv.inspect.invariance import invariance
from omniconv.inspect.receptive_field import receptive_field
from omniconv.models.factory import create_model
from omniconv.models.image.stm import MIXERS
from omniconv.papers.small import Split, accuracy, digits, train

__all__ = ["MixerScores", "compare_mixers", "make_network", "measure_mixer"]

DEPTHS, WIDTHS, WINDOW = (2, 2), (32, 64), 4
SHIFTS = (1.0, 2.0, 4.0)
TURNS = (10.0, 30.0)
SCALES = (0.8, 1.25)


@dataclass(frozen=True)
class MixerScores:
    """What one mixer reached.

    Attributes:
        mixer: its name.
        parameters: of the whole network.
        macs: multiply-adds of one image.
        training_rate: images a second in training.
        inference_rate: images a second in inference.
        field: area that holds half of all contributions to the middle of the last map, over the image's.
        shift: share of answers that a shift by 1, 2 or 4 pixels leaves unchanged.
        rotation: the same for turns by 10 and 30 degrees.
        scale: the same for factors of 0.8 and 1.25.
        accuracy: share of right answers on the test images.
    """

    mixer: str
    parameters: int
    macs: int
    training_rate: float
    inference_rate: float
    field: float
    shift: float
    rotation: float
    scale: float
    accuracy: float


def make_network(mixer: str, seed: int, in_chans: int, classes: int = 10) -> nn.Module:
    """Return the small network of the comparison around a mixer of `MIXERS`."""
    torch.manual_seed(derive(seed, "weights"))
    return create_model(
        "stm_depthwise_micro", num_classes=classes, in_chans=in_chans, mixer=mixer, depths=DEPTHS, widths=WIDTHS,
        window=WINDOW, layer_scale=None,
    )  # fmt: skip


def rates(model: nn.Module, images: torch.Tensor, rounds: int = 3) -> tuple[float, float]:
    """Return images a second in training and in inference, from medians."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for round_ in range(rounds + 1):
        for training in seconds:
            model.train(training)
            start = time.perf_counter()
            with torch.set_grad_enabled(training):
                y = model(images)
            if training:
                F.cross_entropy(y, torch.zeros(len(y), dtype=torch.long)).backward()
                model.zero_grad()
            if round_:
                seconds[training].append(time.perf_counter() - start)
    training, inference = (len(images) / statistics.median(seconds[mode]) for mode in (True, False))
    return training, inference


def measure_mixer(
    mixer: str, data: tuple[Split, Split], *, epochs: float, seed: int = 0, shift: int = 0, flip: bool = False
) -> MixerScores:
    """Train the network around one mixer and measure it.

    Args:
        mixer: name in `MIXERS`.
        data: training and test images.
        epochs: passes over the training images.
        seed: of weights, order and augmentation.
        shift: largest random shift in training, in pixels.
        flip: mirror half of the training images.
    """
    training, test = data
    _, channels, height, width = training[0].shape
    model = make_network(mixer, seed, channels, int(training[1].max()) + 1)
    speed = rates(model, training[0][:128])
    train(model, training, epochs=epochs, seed=seed, shift=shift, flip=flip)
    cost = count_cost(model, (channels, height, width))
    return MixerScores(
        mixer, cost.parameters, cost.macs, *speed,
        field=receptive_field(model, test[0][:32]).area_ratio(0.5),
        shift=invariance(model, test[0], "translation", SHIFTS).mean,
        rotation=invariance(model, test[0], "rotation", TURNS).mean,
        scale=invariance(model, test[0], "scale", SCALES).mean,
        accuracy=accuracy(model, test) / 100,
    )  # fmt: skip


def compare_mixers(
    mixers: Iterable[str] | None = None,
    *,
    epochs: float = 10.0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[MixerScores]:
    """Compare mixers on scikit-learn's digits, enlarged to 32 pixels, with random shifts in training.

    Args:
        mixers: names in `MIXERS`; all of them by default.
        epochs: passes over the 1,300 training images.
        progress: called with how many mixers are done, and of how many.
    """
    names = list(MIXERS if mixers is None else mixers)
    data = digits(32)
    scores = []
    for done, name in enumerate(names):
        progress(done, len(names))
        scores.append(measure_mixer(name, data, epochs=epochs, shift=2))
    progress(len(names), len(names))
    return scores
