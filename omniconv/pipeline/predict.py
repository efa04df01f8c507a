"""From pictures to predictions, with the preprocessing that the network was trained with."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from omniconv.core.errors import DataError
from omniconv.data.preprocess import Preprocess
from omniconv.deploy.accelerate import accelerate
from omniconv.tasks.base import Task

__all__ = ["Predictor"]


class Predictor:
    """A trained network with everything around it; what `predict`, `eval` and `serve` use.

    Args:
        model: the network; it is put into eval mode.
        preprocess: from raw pixels to its input.
        task: from its outputs to predictions.
        channels: of the pictures it takes.
        name: what to call it.
    """

    def __init__(
        self, model: nn.Module, preprocess: Preprocess, task: Task, channels: int, name: str
    ) -> None:
        self.model = accelerate(model.eval())
        self.preprocess, self._task, self.channels, self.name = preprocess, task, channels, name

    @property
    def classes(self) -> list[str]:
        """Names of the classes, labels or values."""
        return list(self._task.classes)

    @property
    def task(self) -> str:
        """Name of the task."""
        return self._task.name

    @torch.no_grad()
    def predict_tensors(self, images: Iterable[Tensor], batch: int = 64) -> np.ndarray:
        """Return predictions (N, K) of raw pictures (C, H, W) of any sizes.

        Every picture is resized on its own, so a prediction does not depend on what stands beside it.
        """
        rows: list[np.ndarray] = []
        waiting: list[Tensor] = []

        def flush() -> None:
            x = torch.cat(waiting).contiguous(memory_format=torch.channels_last)
            rows.append(self._task.predict(self.model(x)).cpu().numpy())
            waiting.clear()

        for image in images:
            waiting.append(self.preprocess(image[None]))
            if len(waiting) == batch:
                flush()
        if waiting:
            flush()
        return np.concatenate(rows) if rows else np.zeros((0, len(self.classes)), np.float32)

    def tensor(self, image: np.ndarray) -> Tensor:
        """Return a decoded picture (H, W, C) as the raw tensor (C, H, W) that the network was trained on."""
        if image.shape[2] == 1 and self.channels == 3:
            image = image.repeat(3, axis=2)
        elif image.shape[2] in (3, 4) and self.channels == 1:
            weights = np.array([0.299, 0.587, 0.114], np.float32)
            image = (image[..., :3].astype(np.float32) @ weights)[..., None].round().astype(image.dtype)
        elif image.shape[2] == 4 and self.channels == 3:
            image = image[..., :3]
        if image.shape[2] != self.channels:
            raise DataError(f"the network takes {self.channels} channels: got {image.shape[2]}")
        # Deeper pixels than the network was trained on keep their place between black and white.
        if image.dtype == np.uint16 and self.preprocess.high == 255:
            image = image.astype(np.float32) / 257
        if image.dtype == np.uint8 and self.preprocess.high == 65535:
            image = image.astype(np.float32) * 257
        if image.dtype != np.uint8:
            image = image.astype(np.float32)
        return torch.from_numpy(image.transpose(2, 0, 1).copy())  # decoded arrays may be read-only

    def predict_images(self, images: Sequence[np.ndarray]) -> list[dict[str, Any]]:
        """Return one JSON-ready prediction for every decoded picture (H, W, C)."""
        predictions = self.predict_tensors(self.tensor(image) for image in images)
        return [self._task.describe(row) for row in predictions]

    def explain_image(self, image: np.ndarray) -> bytes:
        """Return a PNG of a decoded picture under the activation map of its likeliest class."""
        from omniconv.inspect.picture import overlay_png

        raw = self.tensor(image)
        heat = self.activation_maps(raw[None])[0]
        return overlay_png(raw, heat, self.preprocess.low, self.preprocess.high)

    def activation_maps(self, images: Tensor) -> np.ndarray:
        """Return activation maps (N, H, W) in [0, 1] of raw pictures (N, C, H, W), for the likeliest classes."""
        from omniconv.inspect.cam.layer_cam import layer_cam

        x = self.preprocess(images)
        maps = np.zeros((len(x), 1, 1), np.float32)
        for layer in self._map_layers():
            # A classifier that reads a class token does not read the last map.
            if not maps.any():
                maps = layer_cam(self.model, x, layer=layer).data["map"]
        size = (int(images.shape[2]), int(images.shape[3]))
        resized = nn.functional.interpolate(torch.from_numpy(maps)[:, None], size, mode="bilinear")
        return resized[:, 0].numpy()

    def _map_layers(self) -> list[str | None]:
        """Return the stages whose maps still have 4 x 4 pixels, so that there is something to see, deepest first."""
        info = getattr(self.model, "feature_info", None)
        if info is None:
            return [None]
        wide = [f["module"] for f in info if min(self.preprocess.size) // f["reduction"] >= 4]
        return wide[::-1] or [info[0]["module"]]
