"""What all activation maps share: running a model while one layer is watched, and the map itself."""

import io
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.config import closest
from omniconv.core.errors import DataError, UsageError
from omniconv.inspect.artifact import Artifact
from omniconv.inspect.picture import overlay_png
from omniconv.models.backbone import FeatureExtractor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["CamMap", "Layer", "Target", "activations", "gradients", "target_scores", "watched"]

Layer = nn.Module | str | Sequence[nn.Module | str] | None
"""A module, its dotted name, several of them, or None for the last feature map of the network."""

Target = int | Sequence[int] | Tensor | Callable[[Any], Tensor] | None
"""A class, one class a sample, a function from the model's output to one score a sample, or None for the
class that the model puts first."""

_SHOWN = 16


class CamMap(Artifact):
    """Activation maps of a batch.

    `data["map"]` is (N, H, W) float32 in [0, 1], at the resolution of the input; each map's least value is 0
    and its largest 1 (a map without any contrast is 0). `data["input"]` is the batch (N, C, H, W);
    `data["target"]` the classes (N,) that the maps are for, if they are for classes.
    """

    title = "Class activation maps"

    @classmethod
    def combine(cls, maps: Sequence[Tensor], x: Tensor, target: Tensor | None = None) -> "CamMap":
        """Bring the maps (N, h, w) of one or several layers to the size of `x`, scale and average them."""
        scaled = [
            _unit(F.interpolate(one[:, None].float(), size=x.shape[2:], mode="bilinear")[:, 0])
            for one in maps
        ]
        data = {
            "map": _unit(torch.stack(scaled).mean(0)).cpu().numpy(),
            "input": x.detach().float().cpu().numpy(),
        }
        if target is not None:
            data["target"] = target.cpu().numpy()
        return cls(data)

    def plot(self) -> "Figure":
        """Draw the maps over their inputs; of a larger batch, the first 16."""
        from matplotlib.figure import Figure
        from matplotlib.image import imread

        shown = min(len(self.data["map"]), _SHOWN)
        columns = min(4, shown)
        rows = math.ceil(shown / columns)
        figure = Figure(figsize=(2.4 * columns, 2.5 * rows), layout="constrained")
        axes = np.atleast_1d(np.asarray(figure.subplots(rows, columns, squeeze=False))).ravel()
        for axis in axes:
            axis.set_axis_off()
        for index in range(shown):
            image = torch.from_numpy(self.data["input"][index])
            drawn = overlay_png(image, self.data["map"][index], float(image.min()), float(image.max()))
            axes[index].imshow(imread(io.BytesIO(drawn)), interpolation="nearest")
            if "target" in self.data:
                axes[index].set_title(f"class {self.data['target'][index]}", fontsize=9)
        return figure


def _unit(maps: Tensor) -> Tensor:
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    span = high - low
    # What remains of a constant map is rounding, which must not be blown up into a picture.
    flat = span <= 1e-6 * high.abs()
    return torch.where(flat, 0, (maps - low) / span.where(~flat, 1))


def _layers(model: nn.Module, layer: Layer) -> list[tuple[str, nn.Module]]:
    if layer is None:
        owner = model.backbone if isinstance(model, FeatureExtractor) else model
        info = getattr(owner, "feature_info", None)
        if not info:
            raise UsageError(
                f"{type(model).__name__} does not say where its feature maps are (no feature_info); "
                "name a layer: layer='...'"
            )
        name = info[-1]["module"]
        return [(name, owner.get_submodule(name))]
    if isinstance(layer, nn.Module | str):
        layer = [layer]
    names = {module: name for name, module in model.named_modules()}
    found = []
    for one in layer:
        if isinstance(one, str):
            try:
                found.append((one, model.get_submodule(one)))
            except AttributeError:
                raise UsageError(
                    f"{type(model).__name__} has no layer {one!r}{closest(one, list(names.values()))}"
                ) from None
        elif one in names:
            found.append((names[one], one))
        else:
            raise UsageError(f"the layer {type(one).__name__} is not a part of {type(model).__name__}")
    if not found:
        raise UsageError("no layer was named; leave layer out to take the last feature map")
    return found


@contextmanager
def watched(model: nn.Module, layers: list[tuple[str, nn.Module]]) -> Iterator[dict[str, Tensor]]:
    """Put the model in eval mode and keep each layer's output; leave every module as it was."""
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, Any, Any], Tensor]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> Tensor:
            if not isinstance(output, Tensor) or output.ndim != 4 or not output.is_floating_point():
                shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise UsageError(
                    f"layer {name!r} gives no feature map (N, C, H, W) but {shape}; name another"
                )
            # Copies, for what comes before and after may work in place (ReLU, residual sums).
            seen[name] = output.clone()
            if torch.is_grad_enabled() and not output.requires_grad:
                seen[name].requires_grad_()  # the parameters may all be frozen
            return seen[name].clone()

        return hook

    training = {module: module.training for module in model.modules()}
    handles = [module.register_forward_hook(watch(name)) for name, module in layers]
    try:
        model.eval()
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        for module, flag in training.items():
            module.training = flag


def _run(model: nn.Module, x: Tensor, layer: Layer, score: Callable[[Any], Tensor] | None) -> Any:
    if x.ndim != 4:
        raise ValueError(f"x must be a batch of images (N, C, H, W): got shape {tuple(x.shape)}")
    layers = _layers(model, layer)
    with (
        torch.inference_mode(False),
        torch.set_grad_enabled(score is not None),
        watched(model, layers) as seen,
    ):
        output = model(x.detach().clone())
        for name, _ in layers:
            if name not in seen:
                raise UsageError(f"layer {name!r} takes no part in the forward pass; name another")
            if not torch.isfinite(seen[name]).all():
                raise DataError(
                    f"layer {name!r} gives values that are not finite; look at its input and weights"
                )
        features = [seen[name] for name, _ in layers]
        if score is None:
            return features, []
        total = score(output).sum()
        slopes = torch.autograd.grad(total, features, allow_unused=True) if total.requires_grad else None
        if slopes is None or any(slope is None for slope in slopes):
            raise UsageError("the score does not depend on the layer; name another layer or target")
        return [feature.detach() for feature in features], [slope.detach() for slope in slopes]


def activations(model: nn.Module, x: Tensor, layer: Layer = None) -> list[Tensor]:
    """Return the output (N, C, h, w) of each layer for the batch `x`, in eval mode and without gradients.

    The model comes back as it was: its training flags, its parameters' `.grad` and its hooks. Of a layer
    that runs several times in one pass, the last time counts.

    Args:
        model: any module.
        x: images (N, C, H, W), preprocessed as the model expects them.
        layer: see `Layer`.

    Raises:
        UsageError: if there is no such layer, or it gives no feature map.
        DataError: if a feature map is not finite.
    """
    return _run(model, x, layer, None)[0]


def target_scores(output: Any, target: Target, samples: int) -> tuple[Tensor, Tensor | None]:
    """Return the score (N,) of each sample's target in a model's output, and the classes if they are classes.

    Raises:
        UsageError: if `target` means classes and the output is not (N, classes).
        ValueError: if `target` does not fit the output.
    """
    if callable(target):
        scores = target(output)
        if scores.shape != (samples,):
            raise ValueError(f"target must give one score a sample: got shape {tuple(scores.shape)}")
        return scores, None
    if not isinstance(output, Tensor) or output.ndim != 2:
        raise UsageError(
            "the output is not (N, classes); give target as a function from output to scores (N,)"
        )
    if target is None:
        classes = output.argmax(1)
    else:
        classes = torch.as_tensor(target, device=output.device).expand(len(output))
    if not 0 <= int(classes.min()) <= int(classes.max()) < output.shape[1]:
        raise ValueError(f"target must lie in [0, {output.shape[1]}): got {classes.tolist()}")
    return output.gather(1, classes[:, None])[:, 0], classes.detach()


def gradients(
    model: nn.Module, x: Tensor, target: Target = None, layer: Layer = None
) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    """Return each layer's output, the gradient of each sample's target score by it, and the classes.

    Args:
        model: any module; it comes back as it was, as from `activations`.
        x: images (N, C, H, W).
        target: see `Target`.
        layer: see `Layer`.

    Raises:
        UsageError: as `activations`, and if the score does not depend on the layer.
        ValueError: if `target` does not fit the model's output.
    """
    chosen: list[Tensor] = []

    def score(output: Any) -> Tensor:
        scores, classes = target_scores(output, target, len(x))
        if classes is not None:
            chosen.append(classes)
        return scores

    features, slopes = _run(model, x, layer, score)
    return features, slopes, chosen[0] if chosen else None
