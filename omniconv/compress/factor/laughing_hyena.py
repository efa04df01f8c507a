"""Laughing Hyena: long convolutions of a trained network become recurrences of a few states.

Paper: Massaroli et al., Laughing Hyena Distillery, https://arxiv.org/abs/2310.18780. Where the paper starts from random
poles, the fit starts from those that `balanced_truncation` reads off the filter's Hankel matrix; residues, in which the
filter is linear, are solved for instead of trained.
"""

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.compress.factor.hankel import balanced_truncation, fit_residues
from omniconv.compress.factor.recurrence import Recurrence, block_powers
from omniconv.compress.report import CompressionReport, compare
from omniconv.layers.conv.convert import input_shapes
from omniconv.layers.sequence.hyena_nd import HyenaNd
from omniconv.layers.sequence.long_conv import LongConv
from omniconv.layers.sequence.multi_hyena import MultiHyena, outer_heads, read_heads
from omniconv.layers.sequence.multires import MultiresConv
from omniconv.layers.sequence.sgconv import SGConv

__all__ = ["RecurrentHyena", "distill", "distill_filters"]

M = TypeVar("M", bound=nn.Module)
Hyena = HyenaNd | MultiHyena
HyenaState = tuple[Tensor, list[Tensor]]
"""Of `RecurrentHyena`: the two newest projections (N, (order + 1) C, 2), and the state of every filter."""

LongLayer = LongConv | SGConv | MultiresConv


def distill_filters(kernel: Tensor, order: int, *, steps: int = 300, lr: float = 0.03) -> Recurrence:
    r"""Fit a recurrence of `order` states to every filter (`Laughing Hyena <https://arxiv.org/abs/2310.18780>`_).

    .. math:: \min_{\lambda, R} \sum_{t \ge 1} \Bigl( h_t - \sum_{n=1}^{d} R_n \lambda_n^{t-1} \Bigr)^2,
              \qquad |\lambda_n| < 1

    by gradient descent on the poles, in coordinates of which every real number is stable. Of each filter the best poles
    on the way are kept, so that it ends no worse than with balanced truncation.

    Args:
        kernel: (C, L), from tap 0, which is kept exactly.
        order: states d of a channel, even, less than L // 2; see `distillation_order`.
        steps: of Adam.
        lr: its learning rate.

    Raises:
        ValueError: if `order` is odd or out of range.
    """
    # On the CPU, whose solvers take matrices without full rank.
    target = kernel.detach().double().cpu()
    start = balanced_truncation(target, order)
    scale = target[:, 1:].square().sum(1).clamp_min(1e-300)
    # Jury: the poles are stable if their product D and half their sum a fulfil |D| < 1 and |2 a| < 1 + D.
    product = start.center.detach().square() - start.spread.detach()
    coordinates = torch.stack([product, 2 * start.center.detach() / (1 + product)]).clamp(
        -1 + 1e-12, 1 - 1e-12
    )
    coordinates = coordinates.atanh().requires_grad_()
    optimizer = torch.optim.Adam([coordinates], lr)
    best, found = torch.full_like(scale, torch.inf), coordinates.detach().clone()
    for step in range(steps + 1):
        center, spread = _blocks(coordinates)
        basis = block_powers(center, spread, target.shape[1] - 1).permute(1, 3, 2, 0).flatten(2)
        # What no residues can explain: the part of the filter outside of the span of the blocks' responses.
        span = torch.linalg.qr(F.normalize(basis, dim=1)).Q
        rest = target[:, 1:, None] - span @ (span.mT @ target[:, 1:, None])
        errors = rest.square().sum((1, 2)) / scale
        better = errors.detach() < best
        best = torch.where(better, errors.detach(), best)
        found[:, better] = coordinates.detach()[:, better]
        if step < steps:
            optimizer.zero_grad()
            errors.sum().backward()
            assert coordinates.grad is not None
            # Poles that coincide have no gradient.
            coordinates.grad.nan_to_num_(0.0, 0.0, 0.0)
            optimizer.step()
    center, spread = _blocks(found)
    residues = fit_residues(center, spread, target)
    return Recurrence(*(part.to(kernel) for part in (center, spread, residues, target[:, 0])))


def _blocks(coordinates: Tensor) -> tuple[Tensor, Tensor]:
    product, sum_ = coordinates.tanh()
    center = sum_ * (1 + product) / 2
    return center, center.square() - product


class RecurrentHyena(nn.Module):
    """A causal Hyena operator whose long filters are recurrences: whole sequences at once, or step by step.

    Args:
        hyena: `MultiHyena`, or a causal `HyenaNd` of one axis; its projections are copied.
        filters: one for each of its long convolutions, with the skip in tap 0.

    Shapes:
        - input and output: :math:`(N, C, L)`; of a step :math:`(N, C)`
    """

    def __init__(self, hyena: Hyena, filters: list[Recurrence]) -> None:
        super().__init__()
        self.project, self.short, self.mix = (
            copy.deepcopy(m) for m in (hyena.project, hyena.short, hyena.mix)
        )
        self.filters = nn.ModuleList(filters)
        self.heads = hyena.heads if isinstance(hyena, MultiHyena) else hyena.project.in_channels

    def _operate(self, z: Tensor, convolve: Callable[[int, Tensor], Tensor]) -> Tensor:
        query, *keys, v = z.chunk(len(self.filters) + 2, 1)
        for i, key in enumerate(keys):
            # With more than one convolution every channel is a head, and products are as many as channels.
            v = convolve(i, outer_heads(key, v, self.heads))
        return read_heads(v, query)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the steps of whole sequences."""
        z = self.short(F.pad(self.project(x), (2, 0)))
        return self.mix(self._operate(z, lambda i, v: self.filters[i](v)))

    def prefill(self, x: Tensor) -> tuple[Tensor, HyenaState]:
        """Mix the steps of whole sequences and return the state after their last step as well."""
        z, states = F.pad(self.project(x), (2, 0)), []

        def convolve(i: int, v: Tensor) -> Tensor:
            y, state = self._filter(i).prefill(v)
            states.append(state)
            return y

        return self.mix(self._operate(self.short(z), convolve)), (z[..., -2:], states)

    def step(self, x: Tensor, state: HyenaState | None = None) -> tuple[Tensor, HyenaState]:
        """Return the output of the next step, and the state after it; without a state it is the first step."""
        now, states = self.project(x[..., None]), []
        recent, before = state or (now.new_zeros(*now.shape[:2], 2), None)
        z = torch.cat([recent, now], 2)

        def convolve(i: int, v: Tensor) -> Tensor:
            y, after = self._filter(i).step(v, before[i] if before else self._filter(i).initial_state(len(v)))
            states.append(after)
            return y

        y = self._operate(self.short(z)[..., 0], convolve)
        return self.mix(y[..., None])[..., 0], (z[..., 1:], states)

    def _filter(self, index: int) -> Recurrence:
        module = self.filters[index]
        assert isinstance(module, Recurrence)
        return module


@torch.no_grad()
def _kernels(layer: nn.Module, length: int) -> list[Tensor]:
    """Return the causal filters of a layer, its skips in tap 0; none if it is not a causal layer over time."""
    if isinstance(layer, Hyena):
        if isinstance(layer, HyenaNd) and (layer.directions != "causal" or layer.short.weight.ndim != 3):
            return []
        kernels = layer.filter((length,)).chunk(1 if isinstance(layer, MultiHyena) else layer.order - 1)
        skips = layer.skip.reshape(len(kernels), -1)
        return [torch.cat([k[:, :1] + d[:, None], k[:, 1:]], 1) for k, d in zip(kernels, skips, strict=True)]
    assert isinstance(layer, LongLayer)
    if getattr(layer, "bidirectional", False):
        return []
    # Whatever makes its filter, an impulse tells it.
    like = next(layer.parameters())
    impulse = F.pad(
        like.new_ones(1, len(like if isinstance(layer, MultiresConv) else layer.skip), 1), (0, length - 1)
    )
    return [layer(impulse)[0]]


def distill(model: M, x: Tensor, order: int = 16, *, steps: int = 300) -> tuple[M, CompressionReport]:
    """Replace the causal long convolutions of a trained model by recurrences (`Laughing Hyena <https://arxiv.org/abs/2310.18780>`_).

    `HyenaNd` over time and `MultiHyena` become `RecurrentHyena`; `LongConv`, `SGConv` and `MultiresConv` become
    `Recurrence`. All of them then have `prefill` and `step`, whose cost does not grow with what came before.

    Args:
        model: any module; it stays as it is.
        x: an input that the model takes, as long as those that it was trained on: filters are distilled over as many
            steps as their layer sees.
        order: states of a channel, even, less than half of the steps; see `distillation_order`.
        steps: of the fit, see `distill_filters`.

    Returns:
        The distilled copy, and the report, whose notes name the largest relative error of each layer's filters.

    Raises:
        ValueError: if `order` is odd or out of range.
    """
    result: Any = copy.deepcopy(model)
    notes = []
    for name, shape in input_shapes(model, x, (HyenaNd, MultiHyena, LongConv, SGConv, MultiresConv)).items():
        layer = result.get_submodule(name)
        kernels = _kernels(copy.deepcopy(layer).eval(), shape[2]) if len(shape) == 3 else []
        if not kernels:
            notes.append(f"{name} sees the future or has several axes; it stays a convolution.")
            continue
        filters = [distill_filters(kernel, order, steps=steps) for kernel in kernels]
        new = (RecurrentHyena(layer, filters) if isinstance(layer, Hyena) else filters[0]).train(
            layer.training
        )
        error = max(_error(f, k) for f, k in zip(filters, kernels, strict=True))
        notes.append(f"{name}: {shape[2]} taps in {order} states, relative error at most {error:.2g}.")
        if not name:
            result = new
        else:
            result.set_submodule(name, new)
    if not notes:
        notes.append("The model has no causal long convolution; nothing was changed.")
    return result, compare("Laughing Hyena distillation", model, result, notes=tuple(notes))


@torch.no_grad()
def _error(recurrence: Recurrence, kernel: Tensor) -> float:
    differences = (recurrence.kernel(kernel.shape[1]) - kernel).norm(dim=1)
    return float((differences / kernel.norm(dim=1).clamp_min(1e-30)).max())
