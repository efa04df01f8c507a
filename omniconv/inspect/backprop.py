"""Pictures of what a score depends on: gradients by the image, under three rules for the ReLU.

Papers: guided backpropagation, Springenberg et al., Striving for Simplicity, https://arxiv.org/abs/1412.6806; the
deconvolutional network, Zeiler and Fergus, https://arxiv.org/abs/1311.2901; plain gradients, Simonyan et al.,
https://arxiv.org/abs/1312.6034.
"""

import math
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from omniconv.core.config import closest
from omniconv.core.errors import UsageError
from omniconv.inspect.artifact import Artifact
from omniconv.inspect.cam.base import Target, target_scores, watched

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["GradientPicture", "Rule", "backpropagate"]

Rule = Literal["gradient", "deconvnet", "guided"]

_RELUS = (F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)
_SHOWN = 16


class GradientPicture(Artifact):
    """What came back to the pixels of a batch.

    `data["gradient"]` is (N, C, H, W) float32, signed; `data["input"]` the batch, `data["target"]` the classes (N,)
    whose scores were followed, if they were classes.
    """

    title = "Backpropagated signal"

    def plot(self) -> "Figure":
        """Draw each signal on a scale of its own, grey where it is zero; of a larger batch, the first 16."""
        from matplotlib.figure import Figure

        signal = self.data["gradient"][:_SHOWN]
        if signal.shape[1] != 3:
            signal = signal.sum(1, keepdims=True)
        peak = abs(signal).max((1, 2, 3), keepdims=True)
        pictures = (0.5 + 0.5 * signal / (peak + (peak == 0))).transpose(0, 2, 3, 1)
        columns = min(4, len(pictures))
        rows = math.ceil(len(pictures) / columns)
        figure = Figure(figsize=(2.4 * columns, 2.5 * rows), layout="constrained")
        for index, picture in enumerate(pictures, 1):
            axis = figure.add_subplot(rows, columns, index)
            axis.set_axis_off()
            axis.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            if "target" in self.data:
                axis.set_title(f"class {self.data['target'][index - 1]}", fontsize=9)
        return figure


class _RuledRelu(torch.autograd.Function):
    """A ReLU that lets the backward signal through by one of the rules."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rule: Rule) -> Tensor:
        y = x.clamp(min=0)
        ctx.save_for_backward(y)
        ctx.rule = rule
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (y,), (signal,) = ctx.saved_tensors, grads
        if ctx.rule != "gradient":
            signal = signal.clamp(min=0)
        if ctx.rule != "deconvnet":
            signal = signal * (y > 0)
        return signal, None


class _RuledRelus(TorchFunctionMode):
    """Puts the rule in place of every ReLU that runs, module or function."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule: Rule = rule
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _RELUS:
            self.count += 1
            x = args[0] if args else (kwargs or {})["input"]
            return _RuledRelu.apply(x, self.rule)
        return func(*args, **(kwargs or {}))


def backpropagate(
    model: nn.Module, x: Tensor, target: Target = None, *, rule: Rule = "guided"
) -> GradientPicture:
    r"""Follow a score back to the pixels, by default with `guided backpropagation
    <https://arxiv.org/abs/1412.6806>`_.

    At a ReLU :math:`y = \max(x, 0)`, the signal R that arrives becomes

    .. math:: R\, [y > 0] \ \text{("gradient")}, \qquad
              R\, [R > 0] \ \text{("deconvnet")}, \qquad
              R\, [y > 0]\, [R > 0] \ \text{("guided")}

    Everywhere else it is the gradient, through maximum pooling by its switches too.

    Args:
        model: any module whose activations are ReLUs; it runs in eval mode, and its state, mode and gradients stay.
        x: images (N, C, H, W), preprocessed as the model expects them.
        target: a class, one class a sample, or a function from the model's output to scores (N,); the class that the
            model puts first by default.
        rule: what the signal passes at a ReLU.

    Raises:
        UsageError: if no ReLU runs where a rule is asked for, or the score does not depend on the images.
        ValueError: if `rule` is unknown, or `x` or `target` does not fit.
    """
    if rule not in get_args(Rule):
        raise ValueError(
            f"rule must be one of {get_args(Rule)}: got {rule!r}{closest(rule, list(get_args(Rule)))}"
        )
    if x.ndim != 4:
        raise ValueError(f"x must be a batch of images (N, C, H, W): got shape {tuple(x.shape)}")
    with torch.inference_mode(False), torch.enable_grad(), watched(model, []), _RuledRelus(rule) as relus:
        images = x.detach().clone().requires_grad_()
        # The model sees a copy, for its first layer may work in place.
        scores, classes = target_scores(model(images.clone()), target, len(x))
        if rule != "gradient" and not relus.count:
            raise UsageError(f"{type(model).__name__} has no ReLU for rule={rule!r}; use rule='gradient'")
        if not scores.requires_grad:
            raise UsageError("the score does not depend on the images; give another target")
        (signal,) = torch.autograd.grad(scores.sum(), images)
    data = {"gradient": signal.float().cpu().numpy(), "input": x.detach().float().cpu().numpy()}
    if classes is not None:
        data["target"] = classes.cpu().numpy()
    return GradientPicture(data)
