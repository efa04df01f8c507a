"""What a network must beat: an answer without looking, and a linear model on shrunken pixels."""

import warnings
from collections.abc import Sequence

import numpy as np
import torch

from omniconv.core.seeds import derive
from omniconv.data.preprocess import resize
from omniconv.data.sources import ImageData
from omniconv.pipeline.plan import Symmetry
from omniconv.tasks.base import Task

__all__ = ["LinearProbe", "targets_of"]

PIXELS = 16
MOST = 5000


def targets_of(data: ImageData, indices: Sequence[int]) -> np.ndarray:
    """Return targets: int64 (N,) for classification, float32 (N, K) otherwise."""
    values = [data.samples[index].target for index in indices]
    if data.schema.task == "classification":
        return np.array(values, dtype=np.int64)
    return np.array(values, dtype=np.float32).reshape(len(values), -1)


class LinearProbe:
    """Logistic or ridge regression on pictures shrunk to 16 x 16 pixels, fitted to at most 5,000 of them.

    Args:
        data: the pictures.
        train: indices to fit on.
        task: what to predict.
        seed: of the choice of pictures, if there are more.
    """

    def __init__(self, data: ImageData, train: Sequence[int], task: Task, seed: int) -> None:
        from sklearn.linear_model import LogisticRegression, Ridge
        from sklearn.multioutput import MultiOutputClassifier
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        self.data, self.task = data, task
        random = np.random.default_rng(derive(seed, "probe"))
        chosen = list(train) if len(train) <= MOST else random.choice(train, MOST, replace=False).tolist()
        features, targets = self._features(chosen), targets_of(data, chosen)
        model = Ridge(100.0) if task.name == "regression" else LogisticRegression(C=0.01, max_iter=100)
        if task.name == "multilabel":
            # A label that all or none of these samples has cannot be fitted; its share stays the answer.
            self.shares = targets.mean(0)
            self.fitted = (self.shares > 0) & (self.shares < 1)
            model, targets = MultiOutputClassifier(model), targets[:, self.fitted]
        self.pipeline = make_pipeline(StandardScaler(), model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a probe that has not quite converged is a probe all the same
            self.pipeline.fit(features, targets)

    def _features(self, indices: Sequence[int], flip: tuple[int, ...] = ()) -> np.ndarray:
        rows = []
        for index in indices:
            image = resize(self.data.read(index)[None].float(), (PIXELS, PIXELS))[0]
            rows.append((image.flip(flip) if flip else image).flatten())
        return torch.stack(rows).numpy()

    def predict(self, indices: Sequence[int], flip: tuple[int, ...] = ()) -> np.ndarray:
        """Return predictions (N, K), optionally of pictures flipped along axes: 1 upside down, 2 left to right."""
        features = self._features(indices, flip)
        if self.task.name == "regression":
            return self.pipeline.predict(features).reshape(len(indices), -1)
        probabilities = self.pipeline.predict_proba(features)
        if self.task.name == "multilabel":
            out = np.tile(self.shares.astype(np.float32), (len(indices), 1))
            out[:, self.fitted] = np.stack([p[:, 1] for p in probabilities], 1)
            return out
        out = np.zeros((len(indices), self.task.outputs), np.float32)
        out[:, self.pipeline.classes_] = probabilities
        return out

    def symmetry(self, indices: Sequence[int]) -> Symmetry | None:
        """Return how the probe takes mirrored pictures; None if it learned too little to tell."""
        if self.task.name != "classification" or len(indices) < 30:
            return None
        chosen = list(indices)[:2000]
        truth = targets_of(self.data, chosen)
        plain, horizontal, vertical = (
            float((self.predict(chosen, flip).argmax(1) == truth).mean()) for flip in ((), (2,), (1,))
        )
        chance = max(np.bincount(truth)) / len(truth)
        # A probe that hardly beats chance cannot tell a picture from its mirror image either.
        return Symmetry(plain, horizontal, vertical) if plain > 1.2 * chance else None
