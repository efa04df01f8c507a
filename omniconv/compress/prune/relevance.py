"""Layer-wise relevance propagation: back-propagation by other rules, which gives what each number contributed.

Papers: Bach et al., On Pixel-Wise Explanations for Non-Linear Classifier Decisions by Layer-Wise Relevance
Propagation, https://doi.org/10.1371/journal.pone.0130140; for the :math:`z^+` rule, Montavon et al., Explaining
NonLinear Classification Decisions with Deep Taylor Decomposition, https://arxiv.org/abs/1512.02479. A network runs as
it is; while it does, functions whose rule is not their gradient are replaced, so no rule is for a kind of module.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["RelevanceRules", "relevance"]

_WEIGHTED = frozenset(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear".split()
)
_AVERAGES = frozenset(
    "mean sum avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d".split()
)
_SUMS = frozenset("add add_ __add__ __iadd__ __radd__".split())
_PRODUCTS = frozenset("mul mul_ __mul__ __imul__ __rmul__ div div_ __truediv__".split())
_ONE_TO_ONE = frozenset(
    "relu relu_ relu6 leaky_relu elu selu gelu silu mish sigmoid tanh hardswish hardsigmoid hardtanh softplus clamp "
    "clamp_min clamp_min_ dropout batch_norm layer_norm group_norm instance_norm".split()
)


class _Passed(torch.autograd.Function):
    """Gives y for x, element by element; relevance passes as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Shared(torch.autograd.Function):
    """Gives y for inputs of a function that is linear in all of them, or in each of two, which share the relevance."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, function: Callable[..., Tensor], bilinear: bool, beta: float, *inputs: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*inputs)
        ctx.rest = function, bilinear, beta
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        function, bilinear, beta = ctx.rest
        inputs, arriving = ctx.saved_tensors, grads[0]
        # Of each input 0 is the positive part and 1 the negative one.
        positive, negative = ((0,) * len(inputs),), ((1,) * len(inputs),)
        if bilinear:
            positive, negative = ((0, 0), (1, 1)), ((0, 1), (1, 0))
        with torch.enable_grad():
            parts = [
                tuple(part.requires_grad_() for part in (t.detach().clamp(min=0), t.detach().clamp(max=0)))
                for t in inputs
            ]

            def contributions(signs: tuple[tuple[int, ...], ...]) -> Tensor:
                terms = [function(*(p[s] for p, s in zip(parts, sign, strict=True))) for sign in signs]
                return torch.stack(terms).sum(0)

            up = contributions(positive)
            # What has contributions of one sign only shares all by these.
            against = beta > 0 or bool(((up == 0) & (arriving != 0)).any())
            down = contributions(negative) if against else torch.zeros_like(up)
        flows = _flows(parts, up, torch.where(down == 0, 1, 1 + beta) * arriving)
        if against:
            others = _flows(parts, down, torch.where(up == 0, 1, -beta) * arriving)
            flows = [a + b for a, b in zip(flows, others, strict=True)]
        return (None, None, None, None, *flows)


def _flows(parts: Sequence[tuple[Tensor, ...]], z: Tensor, arriving: Tensor) -> list[Tensor]:
    """Return what goes to each input if what arrives is shared in proportion to the contributions z."""
    share = torch.where(z == 0, 0, arriving / z)
    leaves = [leaf for part in parts for leaf in part]
    gradients = torch.autograd.grad(z, leaves, share, allow_unused=True, retain_graph=True)
    flows = [
        torch.zeros_like(x) if g is None else x.detach() * g for x, g in zip(leaves, gradients, strict=True)
    ]
    return [a + b for a, b in zip(flows[::2], flows[1::2], strict=True)]


class RelevanceRules(TorchFunctionMode):
    r"""While it is active, models record rules of relevance instead of gradients.

    .. math:: R_i = \sum_j \Big( (1 + \beta) \frac{(x_i w_{ij})^+}{\sum_i (x_i w_{ij})^+}
       - \beta \frac{(x_i w_{ij})^-}{\sum_i (x_i w_{ij})^-} \Big) R_j

    for convolutions, linear layers, averages and sums of tensors; a batch norm behind a convolution is folded into
    its weights, biases take nothing. What works element by element passes relevance on, a product leaves it all to
    the larger factor, maximum pooling to the maximum. All that leaves the sum of relevance as it is. Any other
    function, such as attention, has its gradient.

    Differentiate after the block: what ``torch.autograd.grad(score, tensor)`` gives is the relevance of `tensor` if
    `grad_outputs` is the score; that of a weight is what flowed through it.

    Args:
        beta: weight of contributions against the result; 0 is the :math:`z^+` rule.

    Raises:
        ValueError: if `beta` is negative.
    """

    def __init__(self, beta: float = 0.0) -> None:
        super().__init__()
        if beta < 0:
            raise ValueError(f"beta must not be negative: got {beta}")
        self.beta = beta
        self._made: Any = WeakTensorKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function and put its rule in place of its gradient."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if not torch.is_grad_enabled() or not (args and isinstance(args[0], Tensor)):
            return func(*args, **kwargs)
        if name in _WEIGHTED:
            return self._weighted(func, args, kwargs)
        if name in _AVERAGES:
            return self._shared(func, args[:1], args[1:], kwargs)
        if name in _SUMS | _PRODUCTS | _ONE_TO_ONE:
            tensors = [a for a in args[:2] if isinstance(a, Tensor)]
            if name in _SUMS and len(tensors) == 2:
                return self._shared(torch.add, args[:2], args[2:], kwargs)
            y = _run(func, args, kwargs)
            if name == "batch_norm" and args[0] in self._made:
                return self._folded(y, args, kwargs)
            largest = max(tensors, key=Tensor.numel) if name in _PRODUCTS else args[0]
            return _Passed.apply(largest.expand_as(y), y)
        return func(*args, **kwargs)

    def _shared(self, func: Any, inputs: Any, rest: Any, kwargs: Any) -> Any:
        y = _run(func, (*inputs, *rest), kwargs)
        return _Shared.apply(y, lambda *x: func(*x, *rest, **kwargs), False, self.beta, *inputs)

    def _weighted(self, func: Any, args: Any, kwargs: Any) -> Any:
        y = _run(func, args, kwargs)
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        rest, named = args[3:], {k: v for k, v in kwargs.items() if k not in ("weight", "bias")}

        def function(x: Tensor, w: Tensor) -> Tensor:
            return func(x, w, *(() if not rest else (None, *rest)), **named)

        result = _Shared.apply(y, function, True, self.beta, args[0], weight)
        if "transpose" not in func.__name__:
            self._made[result] = function, args[0], weight
        return result

    def _folded(self, y: Tensor, args: Any, kwargs: Any) -> Any:
        function, x, weight = self._made[args[0]]
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        norm = {
            "training": False,
            "eps": 1e-5,
            "weight": None,
            **dict(zip(names, args, strict=False)),
            **kwargs,
        }
        if norm["training"] or norm["running_var"] is None:
            return _Passed.apply(args[0], y)
        scale = (norm["running_var"] + norm["eps"]).rsqrt()
        if norm["weight"] is not None:
            scale = scale * norm["weight"]
        with torch.no_grad():
            scaled = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
        return _Shared.apply(y, function, True, self.beta, x, _Passed.apply(weight, scaled))


def _run(func: Any, args: Any, kwargs: Any) -> Tensor:
    """Run a function without its gradient, on a copy of what it may change in place."""
    with torch.no_grad():
        return func(args[0].clone(), *args[1:], **kwargs)


def relevance(
    model: nn.Module, x: Tensor, labels: Tensor, *, beta: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return how much every input contributed to the scores of the labels, and what flowed through every weight.

    Args:
        model: gives logits (N, K); it stays as it is, and runs in eval mode.
        x: inputs (N, ...), preprocessed as the model expects them.
        labels: classes (N,) whose logits are shared out.
        beta: see `RelevanceRules`.

    Returns:
        The relevance of the inputs (N, ...), and by name of parameter how much flowed through its entries, summed over
        the batch. In the latter a sample counts by the size of its score, for or against the label.
    """
    shadow = copy.deepcopy(model).eval().requires_grad_(True)
    inputs = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        with RelevanceRules(beta):
            logits = shadow(inputs)
        score = logits.gather(1, labels[:, None])
        names, weights = zip(*shadow.named_parameters(), strict=True)
        found = torch.autograd.grad(score, (inputs, *weights), score.detach().abs(), allow_unused=True)
    sign = score.detach().sign().reshape(-1, *[1] * (x.ndim - 1))
    return sign * found[0], {name: r for name, r in zip(names, found[1:], strict=True) if r is not None}
