"""Cross-layer equalization: channels of one layer and the next share their range, so that a tensor's step fits all.

Paper: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction,
https://arxiv.org/abs/1906.04721. Biases are not absorbed into the next layer.
"""

from typing import Any, TypeVar, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from omniconv.compress.report import weight_layers
from omniconv.layers.conv.norm_folding import fold_batch_norms, trace_layers

__all__ = ["equalizable_pairs", "equalize"]

M = TypeVar("M", bound=nn.Module)

# f(s x) = s f(x) for s > 0, channel by channel.
_MODULES = (
    nn.Identity, nn.ReLU, nn.Dropout, nn.Dropout2d, nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
)  # fmt: skip
_FUNCTIONS = (F.relu, torch.relu, F.max_pool2d, F.avg_pool2d, F.dropout)


def equalizable_pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Return the names of layers between which there is nothing but what commutes with a channel's scale."""
    layers, modules = weight_layers(model), dict(model.named_modules())
    nodes = trace_layers(model, nn.Linear)
    calls = [str(node.target) for node in nodes if node.op == "call_module"]

    def passes(node: fx.Node) -> bool:
        if node.op == "call_module":
            return type(modules[str(node.target)]) in _MODULES
        if node.op == "call_method":
            return node.target in ("relu", "relu_")
        return node.op == "call_function" and node.target in _FUNCTIONS

    pairs = []
    for node in nodes:
        if node.op != "call_module" or str(node.target) not in layers:
            continue
        after = node
        while len(after.users) == 1 and (after is node or passes(after)):
            after = next(iter(after.users))
        first, second = str(node.target), str(after.target)
        if after is node or after.op != "call_module" or second not in layers:
            continue
        if calls.count(first) == calls.count(second) == 1 and _fits(layers[first], layers[second]):
            pairs.append((first, second))
    return pairs


def _fits(first: nn.Module, second: nn.Module) -> bool:
    """Return whether the channels that one puts out are those that the other takes in."""
    plain = not any(getattr(layer, "transposed", False) for layer in (first, second))
    both_linear = isinstance(first, nn.Linear) == isinstance(second, nn.Linear)
    return plain and both_linear and cast(Any, first).weight.shape[0] == _by_input(second).shape[0]


def _by_input(layer: nn.Module) -> Tensor:
    """Return a view of the weight with the input channels first, of any number of groups."""
    weight, groups = cast(Any, layer).weight, getattr(layer, "groups", 1)
    split = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return split.transpose(1, 2).flatten(0, 1)


def equalize(model: M, *, rounds: int = 20) -> M:
    r"""Return a copy with folded batch norms and equalized weights; its outputs are those of `model` in eval mode.

    .. math:: W_1 \leftarrow S^{-1} W_1, \quad b_1 \leftarrow S^{-1} b_1, \quad W_2 \leftarrow W_2 S, \quad
              s_i = \sqrt{r^{(1)}_i r^{(2)}_i} \,/\, r^{(2)}_i

    with the largest magnitudes r of channel i in both weights (`DFQ <https://arxiv.org/abs/1906.04721>`_).

    Args:
        model: any module; what cannot be traced comes back as it is.
        rounds: over all pairs, because a layer is in two of them.
    """
    model = fold_batch_norms(model)
    pairs = equalizable_pairs(model)
    with torch.no_grad():
        for _ in range(rounds):
            for names in pairs:
                first, second = (cast(Any, model.get_submodule(name)) for name in names)
                one, two = first.weight.flatten(1).abs().amax(1), _by_input(second).flatten(1).abs().amax(1)
                scale = torch.where((one > 0) & (two > 0), (one / two).sqrt(), 1)
                first.weight.div_(scale.reshape(-1, *(1,) * (first.weight.ndim - 1)))
                if first.bias is not None:
                    first.bias.div_(scale)
                groups = getattr(second, "groups", 1)
                per_group = scale.reshape(groups, 1, -1).expand(-1, second.weight.shape[0] // groups, -1)
                second.weight.mul_(
                    per_group.reshape(*second.weight.shape[:2], *(1,) * (second.weight.ndim - 2))
                )
    return model
