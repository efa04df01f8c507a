"""Structural re-parameterization: train several linear branches, deploy the one convolution they sum to.

A module that can be merged defines `merged()`, which returns the plain module that computes the same in
eval mode. `reparameterize` replaces all of them in a copy of a model.
"""

import copy
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

__all__ = ["Mergeable", "fuse_conv_bn", "reparameterize"]

M = TypeVar("M", bound=nn.Module)


@runtime_checkable
class Mergeable(Protocol):
    """A module that knows the single plain module equal to it in eval mode."""

    def merged(self) -> nn.Module:
        """Return that module; `self` stays as it is."""
        ...


def fuse_conv_bn(
    weight: Tensor, bias: Tensor | None, norm: nn.modules.batchnorm._BatchNorm
) -> tuple[Tensor, Tensor]:
    r"""Return (weight, bias) of the convolution that equals convolution followed by `norm` in eval mode.

    .. math:: w' = \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}} w, \qquad
              b' = \beta + \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}} (b - \mu)

    Args:
        weight: (out, in / groups, kernel...).
        bias: (out,) or None.
        norm: batch norm over the `out` channels, with running statistics.

    Raises:
        ValueError: if `norm` keeps no running statistics.
    """
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("norm has no running statistics; only such a batch norm is linear in eval mode")
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.affine:
        scale = scale * norm.weight
    shift = -norm.running_mean if bias is None else bias - norm.running_mean
    shift = shift * scale
    if norm.affine:
        shift = shift + norm.bias
    return weight * scale.reshape(-1, *(1,) * (weight.ndim - 1)), shift


def reparameterize(model: M) -> M:
    """Return a copy of `model` in which every `Mergeable` module is its merged form, in eval mode.

    Outputs equal those of `model` in eval mode to rounding. The copy has other state-dict keys, and its
    merged parts cannot be trained as the branches were.
    """
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        if isinstance(model, Mergeable):
            return model.merged()  # type: ignore[return-value]
        # Parents first, and each child looked up anew: a merged parent takes its children with it, and what
        # then stands at a child's name may be another module.
        for name, module in list(model.named_modules()):
            if name and isinstance(module, Mergeable):
                try:
                    stale = model.get_submodule(name) is not module
                except AttributeError:
                    continue
                if not stale:
                    model.set_submodule(name, module.merged().eval())
    return model
