"""Lesions: how much worse is a network without one of its blocks?

Papers: Veit et al., https://arxiv.org/abs/1605.06431; Park and Kim, How Do Vision Transformers Work?,
https://arxiv.org/abs/2202.06709, who find that the last attention of a stage is missed most.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from omniconv.core.errors import UsageError
from omniconv.inspect.artifact import Artifact
from omniconv.inspect.modes import evaluating

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LesionStudy", "lesion_study"]


class LesionStudy(Artifact):
    """`data["score"]` (B,) without each of the blocks `data["block"]` (B,); `data["whole"]` with all of them."""

    title = "Lesion study"

    @property
    def loss(self) -> np.ndarray:
        """By how much the score falls without each block, (B,)."""
        return self.data["whole"] - self.data["score"]

    def plot(self) -> "Figure":
        """Draw the falls side by side."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 0.3 * len(self.data["block"]) + 1), layout="constrained")
        axis = figure.subplots()
        axis.barh([str(name) for name in self.data["block"]], self.loss)
        axis.invert_yaxis()
        axis.set_xlabel("loss of score without the block")
        return figure


@torch.no_grad()
def lesion_study(model: nn.Module, blocks: Sequence[str], score: Callable[[nn.Module], float]) -> LesionStudy:
    """Return what a model scores when one block after another hands on its input as it is.

    Args:
        model: it is scored in eval mode and comes back as it was.
        blocks: dotted names of blocks whose output has the shape of their first input, such as residual ones.
        score: from the model to a number; more is better.

    Raises:
        UsageError: if a block changes the shape, so that nothing can be put in its place.
    """
    scores = []
    with evaluating(model):
        for name in blocks:

            def skip(module: nn.Module, inputs: tuple[Any, ...], output: Any, name: str = name) -> Tensor:
                if not isinstance(output, Tensor) or output.shape != inputs[0].shape:
                    raise UsageError(f"block {name!r} changes the shape and cannot be left out; name another")
                return inputs[0]

            handle = model.get_submodule(name).register_forward_hook(skip)
            try:
                scores.append(float(score(model)))
            finally:
                handle.remove()
        whole = float(score(model))
    return LesionStudy({"block": np.array(blocks), "score": np.array(scores), "whole": np.array(whole)})
