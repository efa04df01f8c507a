"""Early exits: heads at chosen depths of any network, through which samples leave that are already clear.

Papers: BranchyNet, Teerapittayanon et al., https://arxiv.org/abs/1709.01686, which trains all exits together and lets
samples of low entropy leave; Shallow-Deep Networks, Kaya et al., https://arxiv.org/abs/1810.07052, which also trains
the exits of a finished network that itself stays as it is.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

__all__ = [
    "Calibration",
    "Confidence",
    "EarlyExits",
    "ExitHead",
    "add_exits",
    "calibrate",
    "confidence",
    "exit_loss",
    "taken_exits",
]

Confidence = Literal["softmax", "entropy", "margin"]


def confidence(logits: Tensor, kind: Confidence = "softmax") -> Tensor:
    r"""Return how sure every row of logits (N, K) is, (N,), above 0 and at most 1.

    .. math:: \max_k p_k, \qquad 1 + \frac{1}{\log K} \sum_k p_k \log p_k, \qquad p_{(1)} - p_{(2)}

    for "softmax", "entropy" and "margin", the lead of the first class over the second.

    Raises:
        ValueError: if there are fewer than two classes, or `kind` is none of the three.
    """
    classes = logits.shape[1]
    if classes < 2:
        raise ValueError(f"confidence needs at least two classes: got {classes}")
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
    p = log_p.exp()
    if kind == "softmax":
        sure = p.amax(1)
    elif kind == "entropy":
        # Classes of no probability contribute nothing.
        sure = 1 + (p * log_p.clamp(min=-1e4)).sum(1) / math.log(classes)
    elif kind == "margin":
        first, second = p.topk(2, 1).values.unbind(1)
        sure = first - second
    else:
        raise ValueError(f"confidence must be softmax, entropy or margin: got {kind!r}")
    # Nobody is so unsure that the threshold 0 keeps him.
    return sure.clamp(torch.finfo(sure.dtype).tiny, 1)


class ExitHead(nn.Module):
    r"""The plainest exit: mean over all places, layer norm, linear layer.

    .. math:: z = W\, \mathrm{LN}\Big(\frac{1}{P} \sum_p x_p\Big) + b

    Args:
        features: of one place.
        num_classes: outputs.
        device, dtype: of the parameters.

    Shapes:
        - input: maps :math:`(N, C, H, W)`, tokens :math:`(N, L, C)` or features :math:`(N, C)`
        - output: :math:`(N, K)`
    """

    def __init__(self, features: int, num_classes: int, *, device=None, dtype=None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features, device=device, dtype=dtype)
        self.fc = nn.Linear(features, num_classes, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        if x.ndim > 3:
            x = x.flatten(2).mean(2)
        elif x.ndim == 3:
            x = x.mean(1)
        return self.fc(self.norm(x))


class _AllLeft(Exception):
    """No sample is left to compute."""


class EarlyExits(nn.Module):
    r"""A network with exits: in eval mode every sample leaves at the first one that is sure enough.

    .. math:: y_n = z_{n,e}, \qquad e = \min \{ i : c(z_{n,i}) > t_i \}

    with confidence c and thresholds t; the network's own end takes whoever is left. Samples that left are taken out
    of the batch and cost nothing from then on. In training mode the answer is `forward_exits`, logits of all exits.

    The exits stand behind named modules of the network, whose code stays as it is: the head reads a module's output,
    and what runs after the module goes on with the samples that are left. So nothing but this output may be carried
    past an exit for every sample, as it would be by a shortcut around the module.

    Args:
        model: gives logits (N, K); any module. It becomes a part of this one and is not copied.
        heads: name of a module of `model` -> head that turns the module's output into logits, in the order in which
            they run.
        threshold: one for all exits or one for each: 0 lets everybody leave at the first exit, 1 nobody.
        kind: of the confidence.

    Shapes:
        - input: as of `model`, batch first
        - output: :math:`(N, K)`

    Raises:
        ValueError: if there is no exit, no such module, or not one threshold an exit.
    """

    def __init__(
        self,
        model: nn.Module,
        heads: Mapping[str, nn.Module],
        *,
        threshold: float | Sequence[float] = 1.0,
        kind: Confidence = "softmax",
    ) -> None:
        super().__init__()
        if not heads:
            raise ValueError("heads must name at least one exit")
        known = dict(model.named_modules())
        for name in heads:
            if name not in known:
                raise ValueError(f"heads: the model has no module {name!r}")
        self.model = model
        self.exits = tuple(heads)
        self.heads = nn.ModuleList(heads.values())
        self.kind: Confidence = kind
        self.set_threshold(threshold)

    def set_threshold(self, threshold: float | Sequence[float]) -> None:
        """Set one threshold for all exits, or one for each."""
        each = [threshold] * len(self.exits) if isinstance(threshold, int | float) else list(threshold)
        if len(each) != len(self.exits):
            raise ValueError(f"threshold must be one number or {len(self.exits)}: got {len(each)}")
        self.thresholds = tuple(map(float, each))

    @contextmanager
    def _at_exits(self, visit: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
        """Let `visit` see, and replace, what the modules before the exits put out."""
        due = iter(range(len(self.exits)))

        def hook(index: int, output: object) -> Tensor | None:
            if next(due, None) != index:
                raise ValueError(f"heads must follow the order in which modules run once: got {self.exits}")
            if not isinstance(output, Tensor):
                raise ValueError(f"{self.exits[index]} gives {type(output).__name__}, an exit needs a tensor")
            return visit(index, output)

        handles = [
            self.model.get_submodule(name).register_forward_hook(lambda m, x, y, i=index: hook(i, y))
            for index, name in enumerate(self.exits)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def forward_exits(self, x: Tensor, *, detach: bool = False) -> list[Tensor]:
        """Return the logits of all exits, the network's own last.

        Args:
            x: a batch; nobody leaves.
            detach: the heads' gradient stops at the network, so that they learn and it stays as it is.
        """
        logits: list[Tensor] = []
        with self._at_exits(lambda i, y: logits.append(self.heads[i](y.detach() if detach else y))):
            last = self.model(x)
        return [*logits, last]

    def infer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (N, K) and the exit (N,) that every sample took; the network's end is the last one."""
        left = torch.arange(len(x), device=x.device)
        places: list[Tensor] = []
        answers: list[Tensor] = []

        def visit(index: int, output: Tensor) -> Tensor | None:
            nonlocal left
            logits = self.heads[index](output)
            leaves = confidence(logits, self.kind) > self.thresholds[index]
            places.append(left[leaves])
            answers.append(logits[leaves])
            left = left[~leaves]
            if not len(left):
                raise _AllLeft
            return output[~leaves] if leaves.any() else None

        with self._at_exits(visit):
            try:
                answers.append(self.model(x))
                places.append(left)
            except _AllLeft:
                pass
        back = torch.cat(places).argsort()
        taken = torch.cat([torch.full_like(place, index) for index, place in enumerate(places)])
        return torch.cat(answers)[back], taken[back]

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return logits; in training mode those of all exits."""
        return self.forward_exits(x) if self.training else self.infer(x)[0]

    def exit_macs(self, input_shape: Sequence[int]) -> tuple[int, ...]:
        """Return the multiply-adds of a sample (without the batch axis) that takes each exit, passed heads included."""
        with torch.device("meta"):
            shadow = copy.deepcopy(self).to("meta").eval()
            x = torch.empty(1, *input_shape)
        counter = FlopCounterMode(display=False)
        macs: list[int] = []

        def visit(index: int, output: Tensor) -> None:
            shadow.heads[index](output)
            macs.append(counter.get_total_flops() // 2)

        with torch.no_grad(), counter, shadow._at_exits(visit):
            shadow.model(x)
        return *macs, counter.get_total_flops() // 2


def add_exits(
    model: nn.Module, images: Tensor, num_classes: int, exits: Sequence[str] | None = None
) -> EarlyExits:
    """Return a copy of a network with a new `ExitHead` behind each of the named modules.

    Args:
        model: gives logits; it stays as it is.
        images: a few inputs, by which the sizes of the modules' outputs are found.
        num_classes: of the network and its exits.
        exits: names of modules in the order in which they run; by default those of `model.feature_info` but the last.

    Raises:
        ValueError: if there are no names and no `feature_info`.
    """
    if exits is None:
        info = getattr(model, "feature_info", None)
        if info is None:
            raise ValueError(f"{type(model).__name__} has no feature_info: name the modules in exits")
        exits = [feature["module"] for feature in info][:-1]
    model = copy.deepcopy(model)
    probes: dict[str, nn.Module] = {name: nn.Identity() for name in exits}
    network = EarlyExits(model, probes).eval()
    with torch.no_grad():
        outputs = network.forward_exits(images)[:-1]
    for index, y in enumerate(outputs):
        features = y.shape[1] if y.ndim > 3 else y.shape[-1]
        network.heads[index] = ExitHead(features, num_classes, device=y.device, dtype=y.dtype)
    return network.train()


def exit_loss(
    outputs: Sequence[Tensor],
    targets: Tensor,
    weights: Sequence[float] | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Tensor:
    r"""Return the joint loss of all exits, :math:`\sum_e w_e L(z_e, y)`.

    Trained together: `exit_loss(network.forward_exits(x), y)`. In stages, the exits of a finished network:
    `exit_loss(network.forward_exits(x, detach=True)[:-1], y)`.

    Args:
        outputs: logits of every exit.
        targets: what `loss` takes with them.
        weights: of the exits; 1 by default.
        loss: of one exit.
    """
    weights = [1.0] * len(outputs) if weights is None else weights
    terms = [w * loss(logits, targets) for w, logits in zip(weights, outputs, strict=True)]
    return torch.stack(terms).sum()


def taken_exits(
    outputs: Sequence[Tensor], threshold: float | Sequence[float], kind: Confidence = "softmax"
) -> Tensor:
    """Return the exit (N,) that every sample would take, from the logits of all exits."""
    early = outputs[:-1]
    sure = torch.stack([confidence(logits, kind) for logits in early])
    limits = torch.as_tensor(threshold, dtype=sure.dtype, device=sure.device).expand(len(early))
    leaves = torch.cat([sure > limits[:, None], torch.ones_like(sure[:1], dtype=torch.bool)])
    return leaves.to(torch.uint8).argmax(0)


@dataclass(frozen=True)
class Calibration:
    """A threshold and what it comes to on the samples on which it was chosen.

    Attributes:
        threshold: for all exits.
        accuracy: share of right answers with it.
        full_accuracy: share of right answers of the network's end.
        shares: of the samples that take each exit.
        macs: expected multiply-adds of a sample.
    """

    threshold: float
    accuracy: float
    full_accuracy: float
    shares: tuple[float, ...]
    macs: float


def calibrate(
    outputs: Sequence[Tensor],
    labels: Tensor,
    macs: Sequence[float],
    max_drop: float = 0.01,
    kind: Confidence = "softmax",
) -> Calibration:
    """Choose the lowest threshold at which accuracy falls by no more than `max_drop`; cost rises with it.

    Every threshold that makes a difference is tried, in one pass over the sorted confidences.

    Args:
        outputs: logits (N, K) of every exit on samples not trained on (`forward_exits`).
        labels: (N,).
        macs: multiply-adds up to each exit (`exit_macs`).
        max_drop: share of right answers that may be lost, for example 0.01 for one point.
        kind: of the confidence.
    """
    right = torch.stack([logits.argmax(1) == labels for logits in outputs]).long()
    sure = torch.stack([confidence(logits, kind) for logits in outputs[:-1]])
    # As the threshold falls below the highest confidence so far, a sample moves from a later exit to this one.
    best = sure.cummax(0).values
    before = torch.cat([torch.zeros_like(best[:1]), best[:-1]])
    moves = best > before
    gains = torch.zeros_like(right[:-1])
    answer = right[-1]
    for index in reversed(range(len(sure))):
        gains[index] = right[index] - answer
        answer = torch.where(moves[index], right[index], answer)
    values, order = best[moves].sort(descending=True)
    hits = right[-1].sum() + gains[moves][order].cumsum(0)
    # Below each value lies the next; equal ones are passed together.
    below = torch.cat([values[1:], values.new_zeros(1)])
    allowed = (values > below) & (hits >= right[-1].sum() - max_drop * len(labels) - 1e-6)
    threshold = float(below[allowed.nonzero()[-1]]) if allowed.any() else 1.0
    taken = taken_exits(outputs, threshold, kind)
    shares = torch.bincount(taken, minlength=len(outputs)).double() / len(labels)
    return Calibration(
        threshold,
        float(right.gather(0, taken[None]).double().mean()),
        float(right[-1].double().mean()),
        tuple(shares.tolist()),
        float(shares @ torch.tensor(macs, dtype=torch.float64, device=shares.device)),
    )
