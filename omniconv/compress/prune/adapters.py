r"""Structured pruning adapters: a frozen network learns a new task through few weights, while channels are pruned.

Paper: Hedegaard, Efficient Online Processing with Deep Neural Networks, https://arxiv.org/abs/2306.13474, and there
Structured Pruning Adapters, https://arxiv.org/abs/2211.10155. `add_adapters`, then train with any optimizer and
prune channels on the way by `prune_channels` (or by masks of your own, `set_channel_masks`), then `fuse_adapters`.
As an adapter's factors share the weight's rows and columns, a pruned channel takes its part of them along. Norms and
biases stay trainable.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from omniconv.compress.prune.masks import prunable_weights, smallest
from omniconv.compress.report import CompressionReport, compare, weight_layers

__all__ = [
    "SPLoRA", "SPPaRA", "adapted_parameters", "add_adapters", "fuse_adapters", "prune_channels", "set_channel_masks",
]  # fmt: skip

M = TypeVar("M", bound=nn.Module)
ChannelMasks = Mapping[str, tuple[Tensor, Tensor]]
"""Layer -> which of its outputs and which of its inputs (within a group) stay."""


class _Adapter(nn.Module):
    """Adds a learned matrix to the middle tap of a frozen weight (O, I, ...) and zeroes its pruned rows and columns."""

    outputs: Tensor
    inputs: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("outputs", torch.ones(weight.shape[0], dtype=torch.bool, device=weight.device))
        self.register_buffer("inputs", torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device))

    def matrix(self) -> Tensor:
        """Return the learned matrix (O, I)."""
        raise NotImplementedError

    def learned(self) -> int:
        """Return how many entries of its parameters belong to channels that are left."""
        raise NotImplementedError

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight that the layer computes with."""
        middle = tuple(size // 2 for size in weight.shape[2:])
        change = torch.zeros_like(weight)
        change[(slice(None), slice(None), *middle)] = self.matrix()
        kept = self.outputs[:, None] & self.inputs
        return (weight + change) * kept.reshape(*kept.shape, *(1,) * len(middle))


class SPLoRA(_Adapter):
    r"""Low-rank adapter (`paper <https://arxiv.org/abs/2211.10155>`_).

    .. math:: W' = (W + U V) \odot m_o m_i^\top

    with U and V of `rank` columns and rows; of a convolution the product is added to the kernel's middle tap. V begins
    at zero, so the network begins as it was.

    Args:
        weight: (O, I, ...), which stays frozen.
        rank: r.

    Shapes:
        - weight: :math:`(O, I, ...)`
        - output: :math:`(O, I, ...)`
    """

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__(weight)
        self.rows = nn.Parameter(weight.new_empty(weight.shape[0], rank))
        self.columns = nn.Parameter(weight.new_empty(rank, weight.shape[1]))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begin anew."""
        nn.init.kaiming_uniform_(self.rows, a=5**0.5)
        nn.init.zeros_(self.columns)

    def matrix(self) -> Tensor:
        """Return U V."""
        return self.rows @ self.columns

    def learned(self) -> int:
        """Return how many entries of U and V belong to channels that are left."""
        return len(self.columns) * int(self.outputs.sum() + self.inputs.sum())


class SPPaRA(_Adapter):
    r"""Parallel residual adapter: a pointwise convolution beside the frozen one.

    .. math:: W' = (W + A) \odot m_o m_i^\top

    with A at the kernel's middle tap (`paper <https://arxiv.org/abs/2211.10155>`_); it begins at zero.

    Args:
        weight: (O, I, ...), which stays frozen.

    Shapes:
        - weight: :math:`(O, I, ...)`
        - output: :math:`(O, I, ...)`
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self.adapter = nn.Parameter(weight.new_empty(weight.shape[:2]))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begin anew."""
        nn.init.zeros_(self.adapter)

    def matrix(self) -> Tensor:
        """Return A."""
        return self.adapter

    def learned(self) -> int:
        """Return how many entries of A belong to channels that are left."""
        return int(self.outputs.sum() * self.inputs.sum())


def add_adapters(
    model: M,
    kind: Literal["splora", "sppara"] = "splora",
    *,
    rank: int = 8,
    layers: Sequence[str] | None = None,
) -> M:
    """Return a copy of `model` whose convolutions and linear layers are frozen and have adapters.

    Args:
        model: a trained network; it stays as it is.
        kind: "splora" (low rank) or "sppara" (pointwise, which for linear layers is a full matrix).
        rank: of SPLoRA.
        layers: names of the layers that get one; all by default. The weights of the others are frozen as well.

    Raises:
        ValueError: if `kind` is neither, `rank` is not positive, `layers` names none, or a convolution is
            transposed.
    """
    if kind not in ("splora", "sppara"):
        raise ValueError(f"kind must be splora or sppara: got {kind!r}")
    if rank < 1:
        raise ValueError(f"rank must be positive: got {rank}")
    adapted = copy.deepcopy(model)
    for weight in prunable_weights(adapted).values():
        weight.requires_grad_(False)
    for name in prunable_weights(adapted, layers):
        module = adapted.get_submodule(name)
        if getattr(module, "transposed", False):
            raise ValueError(
                f"{name} is a transposed convolution, which has no adapter; leave it out of layers"
            )
        weight = module.get_parameter("weight")
        adapter = SPLoRA(weight, rank) if kind == "splora" else SPPaRA(weight)
        parametrize.register_parametrization(module, "weight", adapter)
    return adapted


def _adapters(model: nn.Module) -> dict[str, _Adapter]:
    found = {}
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            adapter = module.get_submodule("parametrizations.weight.0")
            if isinstance(adapter, _Adapter):
                found[name] = adapter
    if not found:
        raise ValueError("the model has no adapters; call add_adapters first")
    return found


def _weight(module: nn.Module) -> Tensor:
    """Return the weight that a layer computes with; a parametrized one is no parameter."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def set_channel_masks(model: nn.Module, masks: ChannelMasks) -> None:
    """Prune channels of layers with adapters, in place.

    Args:
        model: what `add_adapters` returned.
        masks: layer -> (outputs, inputs) that stay, as booleans; inputs of a grouped convolution are those of a group.

    Raises:
        ValueError: if a layer has no adapter or a mask another length than its channels.
    """
    adapters = _adapters(model)
    for name, pair in masks.items():
        if name not in adapters:
            raise ValueError(f"masks: {name!r} has no adapter")
        for buffer, mask in zip((adapters[name].outputs, adapters[name].inputs), pair, strict=True):
            if mask.shape != buffer.shape:
                raise ValueError(
                    f"{name}: masks must have shape {tuple(buffer.shape)}: got {tuple(mask.shape)}"
                )
            buffer.copy_(mask)


def prune_channels(model: nn.Module, sparsity: float) -> None:
    """Prune the output channels of smallest adapted weights of every layer with an adapter but the last, in place.

    Call it as often as you like while training, with a sparsity that rises.

    Args:
        model: what `add_adapters` returned.
        sparsity: share of each layer's outputs to prune, in [0, 1); at least one stays.

    Raises:
        ValueError: if `sparsity` lies outside [0, 1) or the model has no adapters.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must lie in [0, 1): got {sparsity}")
    adapters = _adapters(model)
    for name in list(adapters)[:-1]:
        with torch.no_grad():
            norms = _weight(model.get_submodule(name)).flatten(1).norm(dim=1)
        count = min(round(sparsity * len(norms)), len(norms) - 1)
        adapters[name].outputs.copy_(~smallest(norms, count))


def adapted_parameters(model: nn.Module) -> int:
    """Return how many numbers a task's own copy holds: adapters of channels that are left, biases and norms."""
    adapters = _adapters(model)
    own = {id(p) for adapter in adapters.values() for p in adapter.parameters()}
    others = sum(p.numel() for p in model.parameters() if p.requires_grad and id(p) not in own)
    return others + sum(adapter.learned() for adapter in adapters.values())


def fuse_adapters(model: M, *, input_shape: tuple[int, ...] | None = None) -> tuple[M, CompressionReport]:
    """Return a plain copy in which adapters and masks are part of the weights, and the report.

    Args:
        model: what `add_adapters` returned, trained and pruned; a model without adapters is copied.
        input_shape: of one sample; the report counts multiply-adds if it is given.

    Returns:
        The fused copy, whose state-dict keys are those of the network before `add_adapters`, and the report.
    """
    fused = copy.deepcopy(model)
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            # torch's own removal changes the class of the layer, which copies share.
            twin = fused.get_submodule(name)
            del twin.parametrizations
            twin.__class__ = parametrize.type_before_parametrizations(module)
            twin.register_parameter("weight", nn.Parameter(_weight(module).detach().clone()))
    for name in weight_layers(fused):
        fused.get_submodule(name).get_parameter("weight").requires_grad_(True)
    note = "Pruned channels are rows and columns of zeros; structured pruning takes them out of the network."
    return fused, compare("structured pruning adapters", model, fused, input_shape=input_shape, notes=(note,))
