"""FLIQS: one training run in which a policy finds every layer's number format, integer or float, with the weights.

Paper: Dotzel et al., FLIQS: One-Shot Mixed-Precision Floating-Point and Integer Quantization Search,
https://arxiv.org/abs/2308.03290. The absolute reward is that of TuNAS, https://arxiv.org/abs/2008.06120.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle
from typing import TypeVar

import torch
from torch import Tensor, nn

from omniconv.compress.quantize.formats import Float, Format, Integer
from omniconv.compress.quantize.layers import quantize_layer, quantized_layers
from omniconv.compress.quantize.quantize import finish
from omniconv.compress.quantize.quantizer import Quantizer, Scheme
from omniconv.compress.report import CompressionReport, weight_layers
from omniconv.core.seeds import generator
from omniconv.design.cost import layer_macs

__all__ = [
    "BFLOAT16",
    "E2M1",
    "E4M3",
    "E5M2",
    "Policy",
    "absolute_reward",
    "fliqs",
    "search_formats",
]

M = TypeVar("M", bound=nn.Module)

E2M1 = Float(2, 1)
E4M3 = Float(4, 3, reserved=1)
E5M2 = Float(5, 2, reserved=4)
BFLOAT16 = Float(8, 7, reserved=128)

_INTEGERS = tuple(Integer(bits) for bits in range(4, 9))


class Policy:
    r"""Independent choices of a format for every layer, learned by REINFORCE.

    .. math:: \nabla_\theta J = (r - \bar r)\, \nabla_\theta \log p_\theta(\alpha) + \lambda(t)\,
              \nabla_\theta H(p_\theta), \qquad \lambda(t) = \lambda \cos(\pi t / T)

    with the moving average :math:`\bar r` of rewards. The cosine rewards entropy in the first half of the search,
    so that everything is tried, and punishes it in the second, so that the policy commits itself.

    Args:
        layers: to choose for.
        choices: a layer.
        steps: T, of the whole search.
        lr: of Adam.
        entropy: :math:`\lambda`.
        seed: of the samples.
    """

    def __init__(
        self, layers: int, choices: int, steps: int, *, lr: float = 0.05, entropy: float = 0.1, seed: int = 0
    ) -> None:
        self.logits = torch.zeros(layers, choices, requires_grad=True)
        self.steps, self.entropy, self.step, self.baseline = steps, entropy, 0, math.nan
        self._optimizer = torch.optim.Adam([self.logits], lr)
        self._random = generator(seed, "fliqs")

    def probabilities(self) -> Tensor:
        """Return the probability of every choice, (layers, choices)."""
        return self.logits.detach().softmax(1)

    def sample(self) -> list[int]:
        """Return a random choice for every layer."""
        return torch.multinomial(self.probabilities(), 1, generator=self._random)[:, 0].tolist()

    def best(self) -> list[int]:
        """Return the most probable choice for every layer."""
        return self.logits.detach().argmax(1).tolist()

    def update(self, choices: Sequence[int], reward: float) -> None:
        """Learn from the reward of a sample."""
        if math.isnan(self.baseline):
            self.baseline = reward
        logs = self.logits.log_softmax(1)
        entropy = -(logs.exp() * logs).sum(1).mean()
        weight = self.entropy * math.cos(math.pi * self.step / self.steps)
        chosen = logs[torch.arange(len(choices)), torch.tensor(choices)].sum()
        loss = -(reward - self.baseline) * chosen - weight * entropy
        (self.logits.grad,) = torch.autograd.grad(loss, [self.logits])
        self._optimizer.step()
        self.baseline += 0.05 * (reward - self.baseline)
        self.step += 1


def absolute_reward(quality: float, cost: float, target: float, beta: float = 1.0) -> float:
    r"""Return :math:`Q - \beta \, |C / C_0 - 1|`, largest for the best of those that cost what they may.

    Args:
        quality: Q.
        cost: C.
        target: :math:`C_0`.
        beta: what missing the target is worth.
    """
    return quality - beta * abs(cost / target - 1)


def search_formats(
    quality: Callable[[Sequence[int]], float], costs: Sequence[Sequence[float]], target: float, policy: Policy,
    *, beta: float = 1.0,
) -> list[int]:  # fmt: skip
    """Run a policy over its steps and return its choices.

    Args:
        quality: of choices, layer by layer.
        costs: layers by choices; they add up.
        target: for the sum.
        policy: new.
        beta: of `absolute_reward`.
    """
    for _ in range(policy.steps):
        choices = policy.sample()
        cost = sum(row[choice] for row, choice in zip(costs, choices, strict=True))
        policy.update(choices, absolute_reward(quality(choices), cost, target, beta))
    return policy.best()


def _schemes(form: Format) -> tuple[Scheme, Scheme]:
    """Return the schemes of weight and input; their ranges follow the weights while those are trained."""
    inputs = Scheme(Integer(form.bits, signed=False), symmetric=False, dynamic=True)
    return (
        Scheme(form, per="channel", dynamic=True),
        inputs if isinstance(form, Integer) else Scheme(form, dynamic=True),
    )


def set_formats(model: nn.Module, formats: Mapping[str, Format]) -> None:
    """Give quantized layers other formats, in place, with ranges that follow weights and inputs."""
    layers = quantized_layers(model)
    for name, form in formats.items():
        layer, (weights, inputs) = layers[name], _schemes(form)
        weight = layer._parameters["weight"]
        assert weight is not None
        layer.weight_quantizer = Quantizer(weights, layer.weight_quantizer.axis).to(weight)
        layer.input_quantizer = Quantizer(inputs, 1).to(weight)


def fliqs(
    model: M,
    losses: Iterable[Callable[[nn.Module], Tensor]],
    score: Callable[[nn.Module], float],
    input_shape: tuple[int, ...],
    *,
    steps: int,
    formats: Sequence[Format] | Mapping[str, Sequence[Format]] = _INTEGERS,
    bits: float = 4.0,
    lr: float = 2e-3,
    warmup: float = 0.25,
    seed: int = 0,
) -> tuple[M, CompressionReport]:
    """Train weights and search formats at once (`FLIQS <https://arxiv.org/abs/2308.03290>`_).

    Every step samples a format for each layer, trains the shared float weights through it, and lets the policy learn
    from the score of the same sample. The formats found are used with the weights as they are, without retraining.

    Args:
        model: any module; it stays as it is. Batch norms are not folded.
        losses: of a model on one training batch each; they are gone through again when they end.
        score: of a model on a validation batch, from 0 to 1; more is better.
        input_shape: of one sample.
        steps: of the search.
        formats: to choose from, each for a layer's weight and input alike; by layer where they differ, equally
            many for each; a layer that is not named stays in float.
        bits: the target is what the network costs with so many bits in all layers.
        lr: of AdamW for the weights, a one-cycle schedule's peak.
        warmup: share of the steps in which formats are random and the policy does not learn yet.
        seed: of the samples.
    """
    result = copy.deepcopy(model)
    macs = layer_macs(result, input_shape)
    plain = [name for name in weight_layers(result) if name in macs]
    options = formats if isinstance(formats, Mapping) else dict.fromkeys(plain, formats)
    names = list(options)
    costs = [[macs[name] * form.bits**2 for form in options[name]] for name in names]
    target = sum(macs[name] for name in names) * bits**2
    for name in names:
        quantize_layer(result.get_submodule(name), *_schemes(options[name][0]))
    search = max(1, steps - int(warmup * steps))
    policy = Policy(len(names), len(costs[0]), search, seed=seed)
    optimizer = torch.optim.AdamW(result.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    batches = cycle(losses)
    result.train()
    for step in range(steps):
        choices = policy.sample()
        set_formats(result, {name: options[name][c] for name, c in zip(names, choices, strict=True)})
        optimizer.zero_grad(set_to_none=True)
        next(batches)(result).backward()
        optimizer.step()
        schedule.step()
        if step >= steps - search and len(costs[0]) > 1:
            cost = sum(row[c] for row, c in zip(costs, choices, strict=True))
            with torch.no_grad():
                quality = score(result.eval())
            result.train()
            policy.update(choices, absolute_reward(quality, cost, target))
    chosen = {name: options[name][c] for name, c in zip(names, policy.best(), strict=True)}
    set_formats(result, chosen)
    return finish("FLIQS", model, result.eval(), input_shape)
