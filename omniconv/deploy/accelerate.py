"""`accelerate`: any network, faster on this machine, with the same weights, state-dict keys and outputs.

Depthwise convolutions get the implementations of `omniconv.ops.depthwise_conv`; dense 2-d convolutions keep their
weights in channels-last, so that every stretch of layers between two of them runs in that format and is converted
nowhere; and a network in eval mode computes a convolution, the batch norm and the activation behind it as one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from omniconv.deploy.folding import Fold, find_folds
from omniconv.layers.conv.depthwise import DepthwiseConv1d, DepthwiseConv2d, DepthwiseConv3d
from omniconv.ops.depthwise_conv import api
from omniconv.ops.dispatch import explain

__all__ = ["Acceleration", "Change", "accelerate", "acceleration", "bears_channels_last", "decelerate"]

M = TypeVar("M", bound=nn.Module)

_FAST = {nn.Conv1d: DepthwiseConv1d, nn.Conv2d: DepthwiseConv2d, nn.Conv3d: DepthwiseConv3d}
_PLAIN = {fast: plain for plain, fast in _FAST.items()}
# Bytes a second at which a batch norm or an activation passes over its maps, measured on two AVX-512 cores.
_BANDWIDTH = 1.2e10


def accelerate(model: M) -> M:
    """Make any network fast on this machine, in place, and return it.

    Weights, state-dict keys, hooks and outputs stay as they are; `decelerate` takes it back. Layers of subclasses of
    `nn.Conv` are left alone, for they may compute something else. Which implementation a convolution runs is chosen
    call by call, and plain torch runs wherever it is the faster one.

    A network in eval mode is also folded: without gradients, a convolution, the batch norm behind it and the
    activation behind that run as one, which follows changes of their weights (but for those in place through `.data`,
    which torch does not count). A convolution of such a group that is
    called by itself gives what the group gives. In training mode, under hooks and under `torch.compile` every layer
    computes for itself.

    Args:
        model: the network, in the mode in which it will run.
    """
    for module in model.modules():
        if type(module) in _FAST:
            layer = cast(nn.Conv2d, module)
            if layer.groups == layer.in_channels > 1:
                layer.__class__ = _FAST[type(module)]  # type: ignore[assignment]  # a subclass with no state of its own
    if bears_channels_last(model):
        _set_format(model, torch.channels_last)
    if not model.training:
        for fold in find_folds(model):
            fold.attach()
    return model


def decelerate(model: M) -> M:
    """Undo `accelerate`, in place, and return the network; weights go back to torch's default format.

    Args:
        model: the network.
    """
    for fold in _folds(model):
        fold.detach()
    for module in model.modules():
        if type(module) in _PLAIN:
            module.__class__ = _PLAIN[type(module)]  # type: ignore[assignment]
    _set_format(model, torch.contiguous_format)
    return model


def bears_channels_last(model: nn.Module) -> bool:
    """Return whether the network can be trained in channels-last.

    With torch 2.13 on one AVX-512 thread the weight gradient of a strided 1x1 convolution of fewer than 16
    channels in that format writes beyond its memory.
    """
    return not any(
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and max(module.stride) > 1
        and module.in_channels < 16
        for module in model.modules()
    )


def _set_format(model: nn.Module, form: torch.memory_format) -> None:
    for module in model.modules():
        if type(module) is nn.Conv2d and module.groups == 1:
            # `contiguous` would leave the strides of 1x1 kernels, and with them the format of what comes out.
            module.weight.data = module.weight.data.to(memory_format=form)


def _folds(model: nn.Module) -> Iterator[Fold]:
    for module in model.modules():
        fold = module.__dict__.get("_fold")
        if isinstance(fold, Fold):
            yield fold


@dataclass(frozen=True)
class Change:
    """What `accelerate` did to one layer.

    Attributes:
        layer: its name in the network.
        what: which implementation runs it, or what runs with it.
        before: milliseconds a call that plain torch is predicted to take.
        after: milliseconds that are predicted now.
    """

    layer: str
    what: str
    before: float
    after: float


@dataclass(frozen=True)
class Acceleration:
    """What `accelerate` changed in a network, for one input; reads as a table when printed.

    Attributes:
        changes: layer by layer, in the order in which they ran.
    """

    changes: tuple[Change, ...]

    @property
    def saved(self) -> float:
        """Milliseconds that all changes together are predicted to save a call."""
        return sum(change.before - change.after for change in self.changes)

    def __str__(self) -> str:
        rows = [f"{c.layer}: {c.what}, {c.before:.3g} -> {c.after:.3g} ms" for c in self.changes]
        return "\n".join([*rows, f"{len(rows)} layers changed, {self.saved:.3g} ms less by the cost model"])


def acceleration(model: nn.Module, *inputs: Any) -> Acceleration:
    """Return what `accelerate` changed, and what each change is predicted to save, by running the network once.

    The network runs in its own mode; in training mode the predictions are for a step with all gradients.

    Args:
        model: a network that has been accelerated.
        *inputs: what it is called with.
    """
    changes: list[Change] = []
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}

    def note_depthwise(layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        conv, x = cast(nn.Conv2d, layer), arguments[0]
        if conv.padding_mode != "zeros" or x.ndim != conv.weight.ndim:
            return
        how = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
        told = explain(api.depthwise_conv, x, conv.weight, conv.bias, **how)
        seconds = {row.name: row.seconds or 0.0 for row in told.rows}
        if told.chosen != "torch":
            before, after = 1e3 * seconds["torch"], 1e3 * seconds[told.chosen]
            changes.append(Change(names[layer], f"depthwise, {told.chosen}", before, after))

    def note_fold(layer: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        fold = cast(Fold, layer.__dict__["_fold"])
        passes = 1 + (fold.act is not None)
        milliseconds = 1e3 * passes * 2 * output.numel() * output.element_size() / _BANDWIDTH
        changes.append(Change(names[layer], f"folds {fold.describe(names)}", milliseconds, 0.0))

    handles = []
    for module in model.modules():
        if type(module) in _PLAIN:
            handles.append(module.register_forward_pre_hook(note_depthwise))
        if "_fold" in module.__dict__ and not model.training:
            handles.append(module.register_forward_hook(note_fold))
    try:
        with torch.set_grad_enabled(model.training):
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return Acceleration(tuple(changes))
