"""One or more numbers a picture."""

from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from omniconv.tasks.base import bootstrap

__all__ = ["Regression"]


class Regression:
    """Numbers, standardised for training with the training targets' mean and deviation.

    Args:
        classes: names of the target columns.
        mean, std: of each column over the training samples.
    """

    name = "regression"
    output_kind = "values"
    main_metric = "mae"
    higher_is_better = False

    def __init__(self, classes: tuple[str, ...], mean: list[float], std: list[float]) -> None:
        self.classes = tuple(classes)
        self.outputs = len(classes)
        self.mean, self.std = torch.tensor(mean), torch.tensor(std)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean Huber loss of standardised values."""
        mean, std = self.mean.to(targets.device), self.std.to(targets.device)
        return F.smooth_l1_loss(outputs.float(), (targets - mean) / std)

    def predict(self, outputs: Tensor) -> Tensor:
        """Return values in the data's units."""
        return outputs.float() * self.std.to(outputs.device) + self.mean.to(outputs.device)

    def metrics(self, predictions: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """Return mean absolute error, root mean square error and R squared, averaged over columns."""
        error = predictions - targets
        spread = ((targets - targets.mean(0)) ** 2).sum(0)
        r2 = 1 - (error**2).sum(0) / np.maximum(spread, 1e-12)
        return {
            "mae": float(np.abs(error).mean()),
            "rmse": float(np.sqrt((error**2).mean())),
            "r2": float(r2.mean()),
        }

    def score(self, predictions: np.ndarray, targets: np.ndarray) -> float:
        """Return R squared."""
        return self.metrics(predictions, targets)["r2"]

    def evaluate(self, predictions: np.ndarray, targets: np.ndarray, seed: int = 0) -> dict[str, Any]:
        """Return metrics with intervals, and up to 1,000 pairs of true and predicted value."""
        value = self.metrics(predictions, targets)
        intervals = {
            name: bootstrap(
                lambda index, name=name: self.metrics(predictions[index], targets[index])[name],
                len(targets),
                value[name],
                seed,
            )
            for name in value
        }
        step = -(-len(targets) // 1000)
        return {
            "metrics": {name: asdict(interval) for name, interval in intervals.items()},
            "regression": {
                "name": self.classes[0],
                "scatter": np.stack([targets[::step, 0], predictions[::step, 0]], 1).tolist(),
            },
        }

    def majority(self, train_targets: np.ndarray, count: int) -> np.ndarray:
        """Return the mean of the training targets, for every picture."""
        return np.tile(train_targets.mean(0), (count, 1))

    def describe(self, prediction: np.ndarray) -> dict[str, Any]:
        """Return the values by name."""
        values = {name: float(v) for name, v in zip(self.classes, prediction, strict=True)}
        return {"label": ", ".join(f"{v:.4g}" for v in values.values()), "values": values}
