"""Any number of labels a picture."""

from dataclasses import asdict
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from omniconv.tasks.base import bootstrap
from omniconv.tasks.classification import reliability

__all__ = ["MultiLabel", "average_precision"]


def average_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    """Return the mean over labels of the area under the precision-recall curve.

    Labels that no sample has do not count; NaN if there is none.
    """
    values = []
    for column in range(truth.shape[1]):
        relevant = truth[:, column] > 0.5
        if not relevant.any():
            continue
        # Samples with one score stand or fall together, so precision is taken at the end of each tie.
        order = np.argsort(-scores[:, column], kind="stable")
        ordered = scores[order, column]
        last = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)
        hits = np.cumsum(relevant[order])[last]
        recall_step = np.diff(hits, prepend=0) / relevant.sum()
        values.append(float((recall_step * hits / (last + 1)).sum()))
    return float(np.mean(values)) if values else float("nan")


class MultiLabel:
    """Independent labels with sigmoid outputs and binary cross entropy.

    Args:
        classes: names of the labels.
        smoothing: moves targets from 0 and 1 towards one half by this share.
    """

    name = "multilabel"
    output_kind = "multilabel"
    main_metric = "mean_average_precision"
    higher_is_better = True

    def __init__(self, classes: tuple[str, ...], smoothing: float = 0.0) -> None:
        self.classes, self.smoothing = tuple(classes), smoothing
        self.outputs = len(classes)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean binary cross entropy over samples and labels."""
        soft = targets.float() * (1 - self.smoothing) + self.smoothing / 2
        return F.binary_cross_entropy_with_logits(outputs.float(), soft)

    def predict(self, outputs: Tensor) -> Tensor:
        """Return the probability of every label."""
        return outputs.float().sigmoid()

    def metrics(self, predictions: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """Return mean average precision and exact-match accuracy at one half."""
        exact = ((predictions > 0.5) == (targets > 0.5)).all(1)
        return {
            "mean_average_precision": average_precision(predictions, targets),
            "exact_match": float(exact.mean()),
        }

    def score(self, predictions: np.ndarray, targets: np.ndarray) -> float:
        """Return mean average precision."""
        return average_precision(predictions, targets)

    def evaluate(self, predictions: np.ndarray, targets: np.ndarray, seed: int = 0) -> dict[str, Any]:
        """Return metrics with intervals, rates of every label, and calibration over all answers."""
        count = len(targets)
        guess, truth = predictions > 0.5, targets > 0.5
        exact = (guess == truth).all(1)

        def rates(index: np.ndarray | slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            hits = (guess[index] & truth[index]).sum(0).astype(float)
            precision = hits / np.maximum(guess[index].sum(0), 1)
            recall = hits / np.maximum(truth[index].sum(0), 1)
            return precision, recall, 2 * precision * recall / np.maximum(precision + recall, 1e-12)

        precision, recall, f1 = rates(slice(None))
        value = self.metrics(predictions, targets)
        metrics = {
            "mean_average_precision": bootstrap(
                lambda index: average_precision(predictions[index], targets[index]),
                count,
                value["mean_average_precision"],
                seed,
                rounds=100,
            ),
            "macro_f1": bootstrap(lambda index: float(rates(index)[2].mean()), count, float(f1.mean()), seed),
            "exact_match": bootstrap(
                lambda index: float(exact[index].mean()), count, value["exact_match"], seed
            ),
        }
        confidence = np.maximum(predictions, 1 - predictions).ravel()
        return {
            "metrics": {name: asdict(interval) for name, interval in metrics.items()},
            "per_class": [
                {
                    "name": name,
                    "precision": float(precision[i]),
                    "recall": float(recall[i]),
                    "f1": float(f1[i]),
                    "support": int(truth[:, i].sum()),
                }
                for i, name in enumerate(self.classes)
            ],
            "calibration": reliability(confidence, (guess == truth).ravel()),
        }

    def majority(self, train_targets: np.ndarray, count: int) -> np.ndarray:
        """Return the share of every label in the training data, for every picture."""
        return np.tile(train_targets.mean(0), (count, 1))

    def describe(self, prediction: np.ndarray) -> dict[str, Any]:
        """Return the labels that are likelier than not, and all probabilities."""
        chosen = [name for name, p in zip(self.classes, prediction, strict=True) if p > 0.5]
        return {
            "label": "|".join(chosen),
            "confidence": float(np.maximum(prediction, 1 - prediction).min()),
            "probabilities": {name: float(p) for name, p in zip(self.classes, prediction, strict=True)},
        }
