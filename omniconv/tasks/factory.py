"""Tasks by name."""

import numpy as np

from omniconv.core.errors import UsageError
from omniconv.tasks.base import Task
from omniconv.tasks.classification import Classification
from omniconv.tasks.multilabel import MultiLabel
from omniconv.tasks.regression import Regression

__all__ = ["make_task"]


def make_task(
    name: str,
    classes: tuple[str, ...],
    *,
    smoothing: float = 0.0,
    train_targets: np.ndarray | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
) -> Task:
    """Return the task `name` over `classes`.

    Args:
        name: "classification", "multilabel" or "regression".
        classes: names of the classes, labels or target columns.
        smoothing: label smoothing; regression takes none.
        train_targets: regression: targets (N, K) from which the standardisation is taken.
        mean: regression: the standardisation itself, when it is already known.
        std: likewise.
    """
    if name == "classification":
        return Classification(classes, smoothing)
    if name == "multilabel":
        return MultiLabel(classes, smoothing)
    if name == "regression":
        if train_targets is not None:
            mean = train_targets.mean(0).tolist()
            std = [s if s > 0 else 1.0 for s in train_targets.std(0).tolist()]
        if mean is None or std is None:
            raise ValueError("regression needs train_targets, or mean and std")
        return Regression(classes, mean, std)
    raise UsageError(f"no task {name!r}; choose classification, multilabel or regression")
