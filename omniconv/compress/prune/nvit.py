"""NViT: all widths of a vision transformer pruned together, by what they do to the loss for the time that they take.

Paper: Yang et al., Global Vision Transformer Pruning with Hessian-Aware Saliency, https://arxiv.org/abs/2110.04869.
Embedding, heads and hidden units are groups of `trace_structure`; the widths of queries with keys and of values, each
the same in all heads of a layer, are added here. The paper subtracts a constant times the predicted saving from the
score; here that constant is, in each round, the one at which as much goes as the round asks for: units go in the order
of score per saving.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from omniconv.compress.report import CompressionReport, compare
from omniconv.compress.structure.graph import trace_structure
from omniconv.design.cost import count_cost
from omniconv.design.vit_latency import head_widths
from omniconv.layers.attention.self_attention import SelfAttention

__all__ = ["Widths", "nvit", "saliency"]

M = TypeVar("M", bound=nn.Module)


class Widths:
    """The widths of a model that can be pruned: the groups of its structure, and those inside of heads.

    Args:
        model: any module; the insides of its `SelfAttention` layers are found, of others heads go as a whole.
        input_shape: of one sample; see `trace_structure`.

    Attributes:
        sizes: units by name of width.
        structure: of the model.
    """

    def __init__(self, model: nn.Module, input_shape: tuple[int, ...]) -> None:
        self.structure = trace_structure(model, input_shape)
        self.sizes = {name: group.size for name, group in self.structure.groups.items()}
        self._inner: dict[str, tuple[str, bool]] = {}
        self._heads: dict[str, str] = {}
        for name, module in model.named_modules():
            if isinstance(module, SelfAttention):
                for group, found in self.structure.groups.items():
                    if any(part.name == f"{name}.qkv.weight" and part.dim == 0 for part in found.slices):
                        if found.size == module.num_heads:
                            self._heads[group] = name
                        else:
                            # Of a single head these are its features.
                            del self.sizes[group]
                widths = head_widths(module)
                for values, leaf in enumerate(("queries", "values")):
                    if widths[values] > 1:
                        self._inner[f"{name}.{leaf}"] = (name, bool(values))
                        self.sizes[f"{name}.{leaf}"] = widths[values]

    def sums(self, model: nn.Module, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return for each width the sum of `parts`, given by name of parameter, over all that each unit owns."""
        sums = {name: total for name, total in self.structure.scores(parts).items() if name in self.sizes}
        for name, (layer, values) in self._inner.items():
            attention = cast(SelfAttention, model.get_submodule(layer))
            rows = parts[f"{layer}.qkv.weight"].detach().sum(1)
            if f"{layer}.qkv.bias" in parts:
                rows = rows + parts[f"{layer}.qkv.bias"].detach()
            keys = rows.numel() - attention.proj.in_features
            if values:
                rows = rows[keys:] + parts[f"{layer}.proj.weight"].detach().sum(0)
            else:
                rows = rows[:keys]
            sums[name] = rows.view(-1, self.sizes[name]).sum(0).float().cpu()
        return sums

    def remove(self, model: M, keep: Mapping[str, Tensor]) -> M:
        """Return a copy of `model` with the units of `keep`, boolean tensors by name of width; others stay whole."""
        smaller = self.structure.remove(
            model, {name: mask for name, mask in keep.items() if name not in self._inner}
        )
        for name, layer in self._heads.items():
            # Other sizes may be equal to the number of heads, which would leave it in doubt.
            left = int(keep[name].sum()) if name in keep else self.sizes[name]
            cast(SelfAttention, smaller.get_submodule(layer)).num_heads = left
        for name, mask in keep.items():
            if name in self._inner:
                layer, values = self._inner[name]
                _narrow(cast(SelfAttention, smaller.get_submodule(layer)), mask, values)
        return smaller

    def chunk(self, name: str, multiple: int) -> int:
        """Return how many units of a width go at once: `multiple`, or one if they are heads or do not divide."""
        group = self.structure.groups.get(name)
        whole = group is not None and any(len(part.index) > group.size for part in group.slices)
        return 1 if whole or self.sizes[name] % multiple else multiple


def _narrow(attention: SelfAttention, keep: Tensor, values: bool) -> None:
    """Keep some features of every head, in place; queries grow so that the softmax sees what it saw."""
    heads, widths = attention.num_heads, head_widths(attention)
    masks = [torch.ones(width, dtype=torch.bool) for width in widths]
    masks[values] = keep.cpu()
    rows = torch.cat([masks[0].repeat(2 * heads), masks[1].repeat(heads)])
    with torch.no_grad():
        for name, parameter in list(attention.qkv.named_parameters()):
            kept = parameter[rows.nonzero().flatten().to(parameter.device)]
            if not values:
                count = heads * int(keep.sum())
                kept[:count] *= math.sqrt(int(keep.sum()) / len(keep))
            setattr(attention.qkv, name, nn.Parameter(kept, requires_grad=parameter.requires_grad))
        weight = attention.proj.weight
        columns = masks[1].repeat(heads).nonzero().flatten().to(weight.device)
        attention.proj.weight = nn.Parameter(weight[:, columns], requires_grad=weight.requires_grad)
    for linear in (attention.qkv, attention.proj):
        linear.out_features, linear.in_features = linear.weight.shape


def saliency(
    model: nn.Module, widths: Widths, losses: Sequence[Callable[[nn.Module], Tensor]]
) -> dict[str, Tensor]:
    r"""Return the Hessian-aware score of every unit, comparable across all kinds of them.

    .. math:: I_u = \operatorname{mean}_b \Big( \sum_{w \in u} w \frac{\partial L_b}{\partial w} \Big)^2

    over mini-batches b: squares of gradients stand for the curvature of the loss.

    Args:
        model: stays as it is.
        widths: of the model.
        losses: for each mini-batch a function of the model that returns its loss.
    """
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros(size) for name, size in widths.sizes.items()}
    for loss in losses:
        gradients = torch.autograd.grad(loss(model), list(parameters.values()), allow_unused=True)
        parts = {
            name: parameter.detach() * (torch.zeros_like(parameter) if gradient is None else gradient)
            for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
        }
        for name, value in widths.sums(model, parts).items():
            total[name] += value.square() / len(losses)
    return total


def nvit(
    model: M,
    losses: Sequence[Callable[[nn.Module], Tensor]],
    input_shape: tuple[int, ...],
    ratio: float = 0.5,
    *,
    latency: Callable[[nn.Module], float] | None = None,
    rounds: int = 5,
    multiple: int = 1,
    finetune: Callable[[nn.Module], Any] | None = None,
) -> tuple[M, CompressionReport]:
    r"""Prune all widths of a transformer together to a latency (`NViT <https://arxiv.org/abs/2110.04869>`_).

    .. math:: I_u - \eta\, \big(t - t_{\text{without } u}\big)

    is what units are ranked by; :math:`\eta` follows from what a round must save.

    Args:
        model: any module, made for vision transformers; it stays as it is.
        losses: for each mini-batch a function of a model that returns its loss; see `saliency`.
        input_shape: of one sample, for example (3, 224, 224).
        ratio: share of the latency to remove, in [0, 1).
        latency: predicts it for a model whose weights may lie on the meta device, such as that of
            `omniconv.design.vit_latency.LatencyTable`; multiply-adds by default.
        rounds: in which it is removed, in equal parts, with new scores in each.
        multiple: so many units go at once, as kernels like it; heads go one by one.
        finetune: trains a model in place, after every round. The paper has a convolutional teacher here.

    Returns:
        The smaller copy, a plain module, and the report.

    Raises:
        ValueError: if `ratio` lies outside [0, 1), there are no losses, or so much cannot be removed.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio must lie in [0, 1): got {ratio}")
    if not losses:
        raise ValueError("losses must hold a function for each mini-batch: got none")
    predict = latency or (lambda m: count_cost(m, input_shape).macs)
    full = predict(model)
    smaller = copy.deepcopy(model)
    for number in range(1, rounds + 1):
        smaller = _prune(
            smaller, losses, input_shape, full * (1 - ratio * number / rounds), predict, multiple
        )
        if finetune is not None:
            finetune(smaller)
    note = f"Predicted {'multiply-adds' if latency is None else 'latency'}: {predict(smaller) / full:.1%} of before."
    return smaller, compare("NViT", model, smaller, input_shape=input_shape, notes=(note,))


def _prune(
    model: M,
    losses: Sequence[Callable[[nn.Module], Tensor]],
    input_shape: tuple[int, ...],
    target: float,
    predict: Callable[[nn.Module], float],
    multiple: int,
) -> M:
    """Return a copy of `model` whose latency is at most `target`."""
    widths = Widths(model, input_shape)
    shadow = copy.deepcopy(model).to("meta")
    now = predict(shadow)
    chunks: list[tuple[float, str, Tensor]] = []
    # As the model answers when it is used, with batch norms left as they are.
    for name, score in saliency(copy.deepcopy(model).eval(), widths, losses).items():
        # Always something is left of a width.
        *parts, _ = score.argsort().split(widths.chunk(name, multiple))
        if parts:
            keep = torch.ones(len(score), dtype=torch.bool)
            keep[parts[0]] = False
            saving = max(now - predict(widths.remove(shadow, {name: keep})), 1e-9 * now)
            chunks += [(float(score[part].sum()) / saving, name, part) for part in parts]
    chunks.sort(key=lambda chunk: chunk[0])

    def keeping(count: int) -> dict[str, Tensor]:
        keep = {name: torch.ones(size, dtype=torch.bool) for name, size in widths.sizes.items()}
        for _, name, part in chunks[:count]:
            keep[name][part] = False
        return keep

    def left(count: int) -> float:
        return predict(widths.remove(shadow, keeping(count)))

    low, high = 0, len(chunks)
    if left(high) > target:
        raise ValueError(f"ratio: at least {left(high) / now:.0%} of the latency before this round stays")
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if left(middle) > target else (low, middle)
    return widths.remove(model, keeping(high))
