r"""How often a network uses what it reads: once for weights, once for activations, and both weighed together.

Paper: Jha and Mittal, Modeling Data Reuse in Deep Neural Networks by Taking Data-Types into Cognizance,
https://arxiv.org/abs/2008.02565. Arithmetic intensity treats all data alike, M / (P + A). The paper weighs weights
and activations apart,

.. math:: DI = \alpha \frac{M}{P} + (1 - \alpha) \frac{M}{A}

with M multiply-adds, P weights and A activations, inputs and outputs of each layer. Layers are convolutions and
matrix products with weights; biases do not count, since they are not reused by products.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from omniconv.design.cost import layer_costs

__all__ = [
    "ALPHA", "Reuse", "conv_reuse", "data_reuse", "fit_alpha", "mean_reuse", "rank_correlation", "total_reuse",
]  # fmt: skip

ALPHA = 0.8
"""The paper's weight of the reuse of weights."""

_WITH_WEIGHTS = ("conv", "pointwise", "grouped", "depthwise", "linear")


@dataclass(frozen=True)
class Reuse:
    """How much a layer, or a network, computes with what it reads and writes.

    Attributes:
        name: of the layer.
        kind: as in `LayerCost`; "shuffle" and others that only move data have no multiply-adds.
        macs: M, multiply-adds.
        parameters: P, entries of weights.
        activations: A, entries read and written.
    """

    name: str
    kind: str
    macs: int
    parameters: int
    activations: int

    @property
    def weight_reuse(self) -> float:
        """Multiply-adds per weight, M / P; 0 without weights."""
        return self.macs / self.parameters if self.parameters else 0.0

    @property
    def activation_reuse(self) -> float:
        """Multiply-adds per activation, M / A."""
        return self.macs / self.activations if self.activations else 0.0

    @property
    def intensity(self) -> float:
        """Arithmetic intensity, M / (P + A)."""
        return self.macs / (self.parameters + self.activations)

    def weighted(self, alpha: float = ALPHA) -> float:
        """Data-type-aware intensity DI (`paper <https://arxiv.org/abs/2008.02565>`_).

        Args:
            alpha: weight of the reuse of weights, from 0 (activations alone) to 1 (weights alone).

        Raises:
            ValueError: if `alpha` lies outside [0, 1].
        """
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1]: got {alpha}")
        return alpha * self.weight_reuse + (1 - alpha) * self.activation_reuse


def conv_reuse(
    in_channels: int,
    out_channels: int,
    kernel: int,
    out_pixels: int,
    *,
    in_pixels: int | None = None,
    groups: int = 1,
    kind: str = "conv",
) -> Reuse:
    r"""Return the reuse of a layer in closed form.

    .. math:: M = P\,O, \qquad P = \frac{C C' K}{g}, \qquad A = C I + C' O

    for K taps and I input and O output pixels: every weight is used once for an output pixel. A fully connected
    layer has one pixel and one tap, a depthwise one has g = C, and a shuffle, which only moves its input, has K = 0.

    Args:
        in_channels: C.
        out_channels: C'.
        kernel: K, taps, such as 9 for a 3x3 kernel; 0 for a shuffle.
        out_pixels: O.
        in_pixels: I; O by default, as without a stride.
        groups: g.
        kind: name of the kind.
    """
    weights = in_channels * out_channels * kernel // groups
    moved = in_channels * (out_pixels if in_pixels is None else in_pixels) + out_channels * out_pixels
    return Reuse("", kind, weights * out_pixels, weights, moved)


def data_reuse(model: nn.Module, input_shape: tuple[int, ...]) -> tuple[Reuse, ...]:
    """Return the reuse of every layer of a network with weights, in the order in which they run.

    Args:
        model: any module; it is left untouched.
        input_shape: of one sample, for example (3, 224, 224).
    """
    biases = {
        name: bias.numel()
        for name, module in model.named_modules()
        if (bias := module._parameters.get("bias")) is not None
    }
    return tuple(
        Reuse(
            row.name, row.kind, row.macs, row.parameters - biases.get(row.name, 0), row.inputs + row.outputs
        )
        for row in layer_costs(model, input_shape)
        if row.kind in _WITH_WEIGHTS
    )


def total_reuse(layers: Sequence[Reuse]) -> Reuse:
    """Return the reuse of a whole network, from the sums over its layers (the paper's cumulative form).

    Args:
        layers: from `data_reuse`.

    Raises:
        ValueError: if there is no layer.
    """
    _require_layers(layers)
    macs, parameters, activations = (
        sum(getattr(layer, name) for layer in layers) for name in ("macs", "parameters", "activations")
    )
    return Reuse("", "network", macs, parameters, activations)


def mean_reuse(layers: Sequence[Reuse], alpha: float = ALPHA) -> float:
    """Return the mean DI of a network's layers, each counted alike however small (the disjoint form).

    Args:
        layers: from `data_reuse`.
        alpha: weight of the reuse of weights.

    Raises:
        ValueError: if there is no layer.
    """
    _require_layers(layers)
    return float(np.mean([layer.weighted(alpha) for layer in layers]))


def _require_layers(layers: Sequence[Reuse]) -> None:
    if not layers:
        raise ValueError("the network has no convolution or linear layer")


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Return Spearman's rank correlation; equal values share the mean of their ranks."""
    from scipy.stats import spearmanr

    found: Any = spearmanr(x, y)
    return float(found.statistic)


def fit_alpha(
    networks: Mapping[str, Reuse], efficiency: Mapping[str, float], *, steps: int = 100
) -> tuple[float, float]:
    """Return the weight with which DI correlates best with a measured efficiency, and Pearson's correlation there.

    Args:
        networks: reuse of whole networks by name.
        efficiency: of each, such as multiply-adds a second or a joule.
        steps: of the grid over [0, 1].

    Raises:
        ValueError: if there are fewer than three networks.
    """
    if len(networks) < 3:
        raise ValueError(f"a correlation needs at least three networks: got {len(networks)}")
    wanted = [efficiency[name] for name in networks]
    found = [
        (float(np.corrcoef([r.weighted(alpha) for r in networks.values()], wanted)[0, 1]), alpha)
        for alpha in np.linspace(0, 1, steps + 1).tolist()
    ]
    correlation, alpha = max(found)
    return alpha, correlation
