"""Scores that ask gradients, before training, what a network would miss: SNIP, GraSP and SynFlow."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from omniconv.compress.prune.masks import keep_largest, prunable_weights

__all__ = ["grasp_scores", "snip_scores", "synflow_masks", "synflow_scores"]


def snip_scores(
    model: nn.Module, loss: Callable[[nn.Module], Tensor], layers: Sequence[str] | None = None
) -> dict[str, Tensor]:
    r"""Return the connection sensitivities of `SNIP <https://arxiv.org/abs/1810.02340>`_ by layer.

    .. math:: s = \left| w \, \frac{\partial L}{\partial w} \right|

    Args:
        model: usually untrained; it stays as it is.
        loss: gives the loss of a model on one batch.
        layers: names of the layers to score; all by default.
    """
    shadow = copy.deepcopy(model)
    weights = prunable_weights(shadow, layers)
    gradients = torch.autograd.grad(loss(shadow), list(weights.values()))
    return {
        name: (weight.detach() * gradient).abs().float()
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
    }


def grasp_scores(
    model: nn.Module, loss: Callable[[nn.Module], Tensor], layers: Sequence[str] | None = None
) -> dict[str, Tensor]:
    r"""Return what each weight does for the gradient flow, by `GraSP <https://arxiv.org/abs/2002.07376>`_.

    .. math:: s = w \odot H g, \qquad g = \frac{\partial L}{\partial w}, \quad
       H = \frac{\partial^2 L}{\partial w^2}

    A weight of large score goes last: without it the gradient would get smaller.

    Args:
        model: usually untrained; it stays as it is.
        loss: gives the loss of a model on one batch.
        layers: names of the layers to score; all by default.
    """
    shadow = copy.deepcopy(model)
    weights = prunable_weights(shadow, layers)
    gradients = torch.autograd.grad(loss(shadow), list(weights.values()), create_graph=True)
    flow = sum(((g.detach() * g).sum() for g in gradients), start=torch.zeros(()))
    products = torch.autograd.grad(flow, list(weights.values()))
    return {
        name: (weight.detach() * product).float()
        for (name, weight), product in zip(weights.items(), products, strict=True)
    }


def synflow_scores(
    model: nn.Module, input_shape: tuple[int, ...], layers: Sequence[str] | None = None
) -> dict[str, Tensor]:
    r"""Return the synaptic flow through each weight, without data (`SynFlow <https://arxiv.org/abs/2006.05467>`_).

    .. math:: s = \left| w \right| \frac{\partial}{\partial |w|} \sum f_{|w|}(1)

    with the network in eval mode, all of its state replaced by absolute values, on an input of ones.

    Args:
        model: usually untrained; it stays as it is.
        input_shape: of one sample.
        layers: names of the layers to score; all by default.
    """
    # Products of many layers leave the range of single precision.
    shadow = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for tensor in shadow.state_dict().values():
            tensor.abs_()
    weights = prunable_weights(shadow, layers)
    device = next(iter(weights.values())).device
    flow = shadow(torch.ones(1, *input_shape, dtype=torch.float64, device=device)).sum()
    gradients = torch.autograd.grad(flow, list(weights.values()))
    return {
        name: (weight.detach() * gradient).abs()
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
    }


def synflow_masks(
    model: nn.Module,
    sparsity: float,
    input_shape: tuple[int, ...],
    *,
    rounds: int = 100,
    layers: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """Return the masks of SynFlow, which scores anew after every one of many small cuts.

    Args:
        model: usually untrained; it stays as it is.
        sparsity: share of the prunable weights to drop, in [0, 1).
        input_shape: of one sample.
        rounds: in each the same share of the weights that are left goes.
        layers: names of the layers to prune; all by default.
    """
    shadow = copy.deepcopy(model)
    masks: dict[str, Tensor] = {}
    for step in range(1, rounds + 1):
        # What went has the score 0, the smallest, and so stays away.
        masks = keep_largest(
            synflow_scores(shadow, input_shape, layers), 1 - (1 - sparsity) ** (step / rounds)
        )
        with torch.no_grad():
            for name, mask in masks.items():
                shadow.get_submodule(name).get_parameter("weight").masked_fill_(~mask, 0)
    return masks
