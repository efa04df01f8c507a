"""Batch norm folded into the convolution before it, in a copy of any traceable network.

`fuse_conv_bn` has the equation; this finds where it may be used. (`omniconv.deploy.folding` folds without touching
the layers' state; here the norm is gone.)
"""

import copy
from collections import Counter
from typing import Any, TypeVar, cast

import torch
from torch import fx, nn

from omniconv.layers.conv.depthwise import DepthwiseConv1d, DepthwiseConv2d, DepthwiseConv3d
from omniconv.layers.conv.reparam import fuse_conv_bn

__all__ = ["brings_act", "conv_norm_calls", "fold_batch_norms", "trace_layers"]

M = TypeVar("M", bound=nn.Module)

# Subclasses may compute something else.
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, DepthwiseConv1d, DepthwiseConv2d, DepthwiseConv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class _Tracer(fx.Tracer):
    def __init__(self, kinds: tuple[type[nn.Module], ...]) -> None:
        super().__init__()
        self.kinds = kinds

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self.kinds) or not any(isinstance(module, self.kinds) for module in m.modules())


def trace_layers(model: nn.Module, *more: type[nn.Module]) -> list[fx.Node]:
    """Return the nodes of a network's forward pass; none where it cannot be traced (see `torch.fx`).

    Convolutions and batch norms are one node each, and so are layers of the kinds in `more`; whatever holds none of
    them is one node as a whole.
    """
    kinds = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, *more)
    try:
        return list(_Tracer(kinds).trace(model).nodes)
    except Exception:  # tracing runs the network's own code, which may fail in any way on a symbol
        return []


def brings_act(norm: nn.Module) -> bool:
    """Return whether a norm is timm's, with dropout and activation in it."""
    return type(norm).__name__ == "BatchNormAct2d" and isinstance(getattr(norm, "drop", None), nn.Identity)


def conv_norm_calls(model: nn.Module) -> list[tuple[fx.Node, fx.Node]]:
    """Return the calls of convolutions, and those of the batch norms that alone follow them, in order of use.

    Both are called once, and the norm has statistics of its own.
    """
    modules = dict(model.named_modules())
    calls = [node for node in trace_layers(model) if node.op == "call_module"]
    times = Counter(modules[str(node.target)] for node in calls)
    pairs = []
    for node in calls:
        conv, users = modules[str(node.target)], list(node.users)
        if len(users) != 1 or users[0].op != "call_module" or users[0].args != (node,):
            continue
        norm = modules[str(users[0].target)]
        if times[conv] > 1 or times[norm] > 1 or type(conv) not in _CONVS or "weight" not in conv._parameters:
            continue
        if (type(norm) in _NORMS or brings_act(norm)) and cast(Any, norm).running_mean is not None:
            pairs.append((node, users[0]))
    return pairs


def fold_batch_norms(model: M) -> M:
    """Return a copy, in eval mode, whose batch norms are folded into the convolutions that they alone follow.

    Outputs equal those of `model` in eval mode to rounding. A folded convolution has a bias, and an identity (or the
    activation that the norm brought) stands where the norm was. A network that cannot be traced keeps its norms.
    """
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        for conv_call, norm_call in conv_norm_calls(model):
            norm_name = str(norm_call.target)
            conv, norm = (cast(Any, model.get_submodule(str(c.target))) for c in (conv_call, norm_call))
            weight, bias = fuse_conv_bn(conv.weight, conv.bias, norm)
            conv.weight.copy_(weight)
            conv.bias = nn.Parameter(bias.clone())
            model.set_submodule(norm_name, norm.act if brings_act(norm) else nn.Identity())
    return model
