"""What a task is: how outputs become predictions, what is minimised, and what is counted."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from omniconv.core.seeds import derive

__all__ = ["Interval", "Task", "bootstrap"]


@dataclass(frozen=True)
class Interval:
    """A metric and its 95% confidence interval."""

    value: float
    low: float
    high: float


class Task(Protocol):
    """One kind of supervision on images.

    Attributes:
        name: as in the data's schema.
        classes: class names, or the names of the target columns.
        outputs: what the network must put out.
        output_kind: how exported networks turn outputs into predictions ("probabilities", "multilabel",
            "values").
        main_metric: the metric that chooses the best epoch and heads the report.
        higher_is_better: its direction.
    """

    name: str
    classes: tuple[str, ...]
    outputs: int
    output_kind: str
    main_metric: str
    higher_is_better: bool

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of outputs (N, K) against targets, hard (N,) or soft (N, K)."""
        ...

    def predict(self, outputs: Tensor) -> Tensor:
        """Return predictions (N, K) of outputs (N, K): probabilities or values in the data's units."""
        ...

    def metrics(self, predictions: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """Return the quick metrics of predictions, among them the main one."""
        ...

    def score(self, predictions: np.ndarray, targets: np.ndarray) -> float:
        """Return how good predictions are, without a unit: at most 1, and more is better."""
        ...

    def evaluate(self, predictions: np.ndarray, targets: np.ndarray, seed: int = 0) -> dict[str, Any]:
        """Return what the report shows: `metrics` with intervals, and the task's own tables."""
        ...

    def majority(self, train_targets: np.ndarray, count: int) -> np.ndarray:
        """Return `count` predictions of somebody who never looks at a picture."""
        ...

    def describe(self, prediction: np.ndarray) -> dict[str, Any]:
        """Return one prediction for people and machines: `label` or values, `confidence`, `probabilities`."""
        ...


def bootstrap(
    metric: Callable[[np.ndarray], float], count: int, value: float, seed: int, rounds: int = 300
) -> Interval:
    """Return the percentile-bootstrap interval of a metric over `count` samples.

    Args:
        metric: maps sample indices (with repetitions) to the metric of those samples.
        count: number of samples.
        value: the metric of all samples.
        seed: of the resampling.
        rounds: resamples.
    """
    random = np.random.default_rng(derive(seed, "bootstrap"))
    values = [metric(random.integers(0, count, count)) for _ in range(rounds)]
    finite = [v for v in values if np.isfinite(v)]
    if not finite:
        return Interval(value, value, value)
    low, high = np.percentile(finite, [2.5, 97.5])
    return Interval(float(value), float(low), float(high))
