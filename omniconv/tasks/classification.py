"""One class a picture."""

from dataclasses import asdict
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from omniconv.tasks.base import Interval, bootstrap

__all__ = ["Classification", "confusion_matrix", "reliability", "wilson"]


def wilson(right: int, count: int) -> Interval:
    """Return the share of right answers with its Wilson score interval (95%)."""
    if count == 0:
        return Interval(float("nan"), float("nan"), float("nan"))
    z = 1.959964
    share = right / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * np.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return Interval(share, max(0.0, float(centre - half)), min(1.0, float(centre + half)))


def confusion_matrix(truth: np.ndarray, guess: np.ndarray, classes: int) -> np.ndarray:
    """Return counts (true class, predicted class)."""
    return np.bincount(truth * classes + guess, minlength=classes * classes).reshape(classes, classes)


def reliability(confidence: np.ndarray, right: np.ndarray, bins: int = 10) -> dict[str, Any]:
    """Return the reliability diagram and the expected calibration error over equally wide bins."""
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    rows, error = [], 0.0
    for index in range(bins):
        inside = which == index
        if not inside.any():
            continue
        mean, share = float(confidence[inside].mean()), float(right[inside].mean())
        rows.append({"confidence": mean, "accuracy": share, "count": int(inside.sum())})
        error += inside.mean() * abs(mean - share)
    return {"bins": rows, "ece": float(error)}


def _rates(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return precision, recall and F1 of every class; a class without samples or guesses gets 0."""
    hits = np.diag(matrix).astype(float)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.nan_to_num(hits / matrix.sum(0))
        recall = np.nan_to_num(hits / matrix.sum(1))
        f1 = np.nan_to_num(2 * precision * recall / (precision + recall))
    return precision, recall, f1


class Classification:
    """Softmax classification with cross entropy.

    Args:
        classes: names of the classes.
        smoothing: label smoothing of the training loss.
    """

    name = "classification"
    output_kind = "probabilities"
    main_metric = "accuracy"
    higher_is_better = True

    def __init__(self, classes: tuple[str, ...], smoothing: float = 0.0) -> None:
        self.classes, self.smoothing = tuple(classes), smoothing
        self.outputs = len(classes)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross entropy against class indices or soft targets."""
        return F.cross_entropy(outputs.float(), targets, label_smoothing=self.smoothing)

    def predict(self, outputs: Tensor) -> Tensor:
        """Return class probabilities."""
        return outputs.float().softmax(1)

    def metrics(self, predictions: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """Return accuracy and the mean negative log-likelihood."""
        own = np.clip(predictions[np.arange(len(targets)), targets], 1e-12, 1)
        return {
            "accuracy": float((predictions.argmax(1) == targets).mean()),
            "nll": float(-np.log(own).mean()),
        }

    def score(self, predictions: np.ndarray, targets: np.ndarray) -> float:
        """Return the share of right answers."""
        return float((predictions.argmax(1) == targets).mean())

    def evaluate(self, predictions: np.ndarray, targets: np.ndarray, seed: int = 0) -> dict[str, Any]:
        """Return metrics with intervals, the confusion matrix, rates of every class, and calibration."""
        count, k = len(targets), self.outputs
        guess = predictions.argmax(1)
        right = guess == targets
        matrix = confusion_matrix(targets, guess, k)
        present = matrix.sum(1) > 0
        precision, recall, f1 = _rates(matrix)
        own = -np.log(np.clip(predictions[np.arange(count), targets], 1e-12, 1))

        def balanced(index: np.ndarray) -> float:
            m = confusion_matrix(targets[index], guess[index], k)
            return float(_rates(m)[1][m.sum(1) > 0].mean())

        def macro_f1(index: np.ndarray) -> float:
            m = confusion_matrix(targets[index], guess[index], k)
            return float(_rates(m)[2][m.sum(1) > 0].mean())

        metrics = {
            "accuracy": wilson(int(right.sum()), count),
            "balanced_accuracy": bootstrap(balanced, count, float(recall[present].mean()), seed),
            "macro_f1": bootstrap(macro_f1, count, float(f1[present].mean()), seed),
            "nll": bootstrap(lambda index: float(own[index].mean()), count, float(own.mean()), seed),
        }
        if k > 5:
            top5 = (np.argpartition(-predictions, 4, axis=1)[:, :5] == targets[:, None]).any(1)
            metrics["top5_accuracy"] = wilson(int(top5.sum()), count)
        return {
            "metrics": {name: asdict(interval) for name, interval in metrics.items()},
            "confusion": matrix.tolist(),
            "per_class": [
                {
                    "name": name,
                    "precision": float(precision[i]),
                    "recall": float(recall[i]),
                    "f1": float(f1[i]),
                    "support": int(matrix[i].sum()),
                }
                for i, name in enumerate(self.classes)
            ],
            "calibration": reliability(predictions.max(1), right),
        }

    def majority(self, train_targets: np.ndarray, count: int) -> np.ndarray:
        """Return the class shares of the training data, for every picture."""
        shares = np.bincount(train_targets, minlength=self.outputs) / len(train_targets)
        return np.tile(shares, (count, 1))

    def describe(self, prediction: np.ndarray) -> dict[str, Any]:
        """Return the likeliest class, its probability, and all of them."""
        best = int(prediction.argmax())
        return {
            "label": self.classes[best],
            "confidence": float(prediction[best]),
            "probabilities": {name: float(p) for name, p in zip(self.classes, prediction, strict=True)},
        }
