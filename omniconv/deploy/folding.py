"""Inference of a convolution, its batch norm and its activation as one convolution, without touching the layers' state.

The three stay where they are and keep their weights; in inference the convolution runs with the norm's scale and
shift in its weight (see `omniconv.layers.conv.reparam`), and its result carries the names of the layers that have
nothing left to do with it.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from omniconv.layers.conv.depthwise import DepthwiseConv1d, DepthwiseConv2d, DepthwiseConv3d
from omniconv.layers.conv.norm_folding import brings_act, conv_norm_calls
from omniconv.layers.conv.reparam import fuse_conv_bn
from omniconv.ops.depthwise_conv import api

__all__ = ["Fold", "find_folds"]

_DEPTHWISE = (DepthwiseConv1d, DepthwiseConv2d, DepthwiseConv3d)
# Subclasses may compute something else.
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_DEPTHWISE)
_ONEDNN = torch.backends.mkldnn.is_available()


def _post_op(act: nn.Module) -> tuple[str, list[float], str] | None:
    """Return what oneDNN calls an activation, or None if it cannot run behind a convolution there."""
    if type(act) is nn.ReLU:
        return "relu", [], ""
    if type(act) is nn.ReLU6:
        return "hardtanh", [0.0, 6.0], ""
    if type(act) is nn.SiLU:
        return "swish", [], ""
    if type(act) is nn.Hardswish:
        return "hardswish", [], ""
    if type(act) is nn.GELU:
        return "gelu", [], act.approximate
    return None


class _Skip:
    """The forward pass of a layer whose work a convolution before it may have done already."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        done = x.__dict__.get("_done", ()) if type(x) is Tensor else ()
        if not done or done[0] is not self.module:
            return type(self.module).forward(self.module, x)
        del cast(Any, x)._done
        if len(done) > 1:
            cast(Any, x)._done = done[1:]
        return cast(nn.Module, self.module.act)(x) if brings_act(self.module) else x


class Fold:
    """A convolution that takes over its batch norm, and the activation behind it, in inference.

    Args:
        conv: the convolution.
        norm: the batch norm that follows it; nothing else uses the convolution's output.
        act: the activation that follows the norm and that nothing else comes before, or None.
        owner: the module that holds the norm.
        name: the norm's name there.
    """

    def __init__(
        self, conv: nn.Module, norm: nn.Module, act: nn.Module | None, owner: nn.Module, name: str
    ) -> None:
        self.conv, self.norm, self.act = conv, norm, act
        # A norm that has been replaced since, for example by a synchronised one, must not be left out.
        self.owner, self.name = owner, name
        self._cache: tuple[Any, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        # What oneDNN packed can be neither copied nor pickled.
        return {**self.__dict__, "_cache": ()}

    def attach(self) -> None:
        """Let the layers run as one from now on."""
        self.conv.__dict__["_fold"] = self
        self.conv.__dict__["forward"] = self.run
        for module in (self.norm, self.act):
            if module is not None:
                module.__dict__["forward"] = _Skip(module)

    def detach(self) -> None:
        """Let every layer compute for itself again."""
        for module in (self.conv, self.norm, self.act):
            if module is not None:
                module.__dict__.pop("forward", None)
        self.conv.__dict__.pop("_fold", None)

    def describe(self, names: dict[nn.Module, str]) -> str:
        """Return the names of the layers that the convolution takes over."""
        return " and ".join(names[m] for m in (self.norm, self.act) if m in names)

    def run(self, x: Tensor) -> Tensor:
        """Compute what the convolution computes, and in inference what the layers behind it do."""
        conv = cast(nn.Conv2d, self.conv)
        if not self._ready(x):
            return type(conv).forward(conv, x)
        weight, bias, packed = self._weights(x)
        post = _post_op(self.act) if self.act is not None else ("none", [], "")
        if packed is None or post is None or self._faster_alone(x, weight, bias):
            y, done = conv._conv_forward(x, weight, bias), (self.norm,)
        else:
            x = x.contiguous(memory_format=torch.channels_last)
            y = torch.ops.mkldnn._convolution_pointwise(
                x, packed, bias, conv.padding, conv.stride, conv.dilation, conv.groups, *post
            )
            done = (self.norm, self.act)
        cast(Any, y)._done = done
        return y

    def _ready(self, x: Tensor) -> bool:
        conv, norm = self.conv, self.norm
        return not (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            # A parametrized convolution computes its weight anew every time.
            or type(conv) not in _CONVS
            or conv.training
            or norm.training
            or type(x) is not Tensor
            or x.device.type != "cpu"
            or x.ndim != cast(Tensor, conv.weight).ndim
            or torch.is_autocast_enabled("cpu")
            or self.owner._modules.get(self.name) is not norm
            or any(m._forward_hooks or m._forward_pre_hooks for m in (conv, norm))
            or (self.act is not None and (self.act._forward_hooks or self.act._forward_pre_hooks))
        )

    def _faster_alone(self, x: Tensor, weight: Tensor, bias: Tensor) -> bool:
        """Return whether a depthwise convolution has an implementation better than oneDNN's."""
        conv = cast(nn.Conv2d, self.conv)
        if type(conv) not in _DEPTHWISE:
            return False
        call = api.TABLE.prepare(
            x, weight, bias, stride=conv.stride, padding=conv.padding, dilation=conv.dilation
        )
        return api.TABLE.select("auto", call).name != "torch"

    def _weights(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the folded weight and bias, and the weight as oneDNN wants it, computed anew after every change."""
        conv, norm = cast(nn.Conv2d, self.conv), cast(nn.BatchNorm2d, self.norm)
        sources = (conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var)
        key = tuple(
            None if t is None else (t.data_ptr(), 0 if t.is_inference() else t._version) for t in sources
        )
        if not self._cache or self._cache[0] != key:
            weight, bias = fuse_conv_bn(conv.weight, conv.bias, norm)
            form = torch.channels_last if weight.ndim == 4 else torch.contiguous_format
            self._cache = key, weight.contiguous(memory_format=form), bias, self._packed(weight, x)
        return self._cache[1:]

    def _packed(self, weight: Tensor, x: Tensor) -> Tensor | None:
        conv = cast(nn.Conv2d, self.conv)
        if not (_ONEDNN and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32):
            return None
        if weight.ndim != 4 or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            return None
        return torch.ops.mkldnn._reorder_convolution_weight(
            weight, conv.padding, conv.stride, conv.dilation, conv.groups, list(x.shape)
        )


def find_folds(model: nn.Module) -> list[Fold]:
    """Return the convolutions of a network, in eval mode, that can take over the layers behind them.

    Networks whose forward pass cannot be traced (see `torch.fx`) have none.
    """
    modules = dict(model.named_modules())
    folds = []
    for conv_call, norm_call in conv_norm_calls(model):
        conv, norm = (modules[str(call.target)] for call in (conv_call, norm_call))
        act, users = None, list(norm_call.users)
        if brings_act(norm):
            act = cast(nn.Module, norm.act)
        elif len(users) == 1 and users[0].op == "call_module" and users[0].args == (norm_call,):
            act = modules[str(users[0].target)]
        if act is not None and _post_op(act) is None:
            act = None
        owner, _, name = str(norm_call.target).rpartition(".")
        folds.append(Fold(conv, norm, act, modules[owner], name))
    return folds
