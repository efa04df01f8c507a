"""A policy learns every layer's number format by reinforcement in one run with the weights: it meets its cost target
with the quality of the exact optimum and commits itself, and a network searched so is as accurate as a uniform one
of equal bit operations, without retraining.

The oracle has 8 layers of 5 formats (integers of 4 to 8 bits): what format c does in layer l lowers the quality by
`d_l 4^-c`, with random d_l, and costs its multiply-adds times bits squared. The network, five convolutions with batch
norm and a classifier, learns Fashion-MNIST averaged to 14 x 14 pixels, 10,000 images, of which the last 250 give
the reward. The search and the uniform 4-bit training have the same 400 steps of 64 images and the same recipe;
formats are integers of 2 to 8 bits. Retraining: as many steps with the formats found, from new weights.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from omniconv.compress.quantize.allocate import frontier
from omniconv.compress.quantize.fliqs import (
    BFLOAT16,
    E2M1,
    E4M3,
    E5M2,
    Policy,
    fliqs,
    search_formats,
)  # fmt: skip
from omniconv.compress.quantize.formats import Float, Format, Integer
from omniconv.compress.quantize.layers import quantized_layers
from omniconv.compress.quantize.quantize import bit_operations
from omniconv.papers.check import Check
from omniconv.papers.checks.adaquant import WIDTHS
from omniconv.papers.checks.quant_survey import network, small_pictures
from omniconv.papers.small import Split, accuracy

COST_ERROR = 0.03
QUALITY_ERROR = 0.02
COMMITTED = 0.95
RETRAINED = 0.5
MARGIN = 0.0
ORACLE_SEEDS = (0, 1, 2, 3, 4)
SEEDS = (0, 1, 2)
LAYERS, CHOICES, SEARCH = 8, 5, 4000
STEPS, BATCH, HELD_OUT = 400, 64, 250
FORMATS = tuple(Integer(bits) for bits in range(2, 9))


def wrong_roundings(form: Format) -> int:
    """Return how many of its values, their middles and what is between a format rounds unlike a search of all codes."""
    assert isinstance(form, Float)
    bias = 2 ** (form.exponent - 1) - 1
    table = []
    for code in range(2 ** (form.exponent + form.mantissa) - form.reserved):
        field, fraction = divmod(code, 2**form.mantissa)
        share = fraction / 2**form.mantissa
        table.append(share * 2.0 ** (1 - bias) if field == 0 else (1 + share) * 2.0 ** (field - bias))
    values = np.array(table)
    middles = (values[1:] + values[:-1]) / 2
    random = np.random.default_rng(0)
    x = np.concatenate([values, middles, values[:-1] + np.diff(values) * random.random(len(values) - 1)])
    # bfloat16 has 32,640 codes: about 10,000 numbers are enough.
    x = x[np.abs(x) < 1e38].astype(np.float32)[:: max(1, len(x) // 10_000)]
    grid = form.grid()
    above, below = (form.round(torch.from_numpy(part), grid).double().numpy() for part in (x, -x))
    wrong = 0
    for start in range(0, len(x), 256):
        part = slice(start, start + 256)
        distance = np.abs(x[part, None].astype(np.float64) - values)
        # Of two equally near the even code.
        tied = distance == distance.min(1, keepdims=True)
        nearest = values[np.where(tied, np.arange(len(values)) % 2, 2).argmin(1)]
        wrong += int((nearest != above[part]).sum() + (-nearest != below[part]).sum())
    return wrong


def _oracle(check: Check) -> None:
    cost_errors, quality_errors, committed = [], [], []
    for seed in ORACLE_SEEDS:
        random = np.random.default_rng(seed)
        damage = 0.05 * random.random(LAYERS)[:, None] * 4.0 ** -np.arange(CHOICES)
        macs = random.integers(1, 9, LAYERS)
        costs = macs[:, None] * (np.arange(CHOICES) + 4) ** 2
        target = float(macs.sum() * 5.5**2)
        rows = np.arange(LAYERS)
        policy = Policy(LAYERS, CHOICES, SEARCH, seed=seed)
        search_formats(lambda c: 1 - damage[rows, c].sum(), costs.tolist(), target, policy)  # noqa: B023
        p = policy.probabilities().numpy()
        best = [point for point in frontier(damage.tolist(), costs.tolist()) if point.size <= target][-1]
        cost_errors.append(abs((p * costs).sum() / target - 1))
        quality_errors.append(1 - (1 - (p * damage).sum()) / (1 - best.cost))
        committed.append(p.max(1).min())
    check.require(
        "distance of the final cost from the target, worst of 5 seeds", max(cost_errors), "<=", COST_ERROR
    )
    check.require("quality lost on the optimum, worst of 5 seeds", max(quality_errors), "<=", QUALITY_ERROR)
    check.require(
        "probability of the format chosen, least sure layer of 5 seeds", min(committed), ">", COMMITTED
    )


def _trained(seed: int, data: Split, formats: Sequence[Format] | Mapping[str, Sequence[Format]]) -> nn.Module:
    """Return a network trained and searched over formats; with one format it is plain quantization-aware training."""
    images, labels = data[0][:-HELD_OUT], data[1][:-HELD_OUT]
    held = data[0][-HELD_OUT:], data[1][-HELD_OUT:]
    random = torch.Generator().manual_seed(seed)

    def losses() -> Iterator[Callable[[nn.Module], torch.Tensor]]:
        while True:
            chosen = torch.randint(len(labels), (BATCH,), generator=random)
            yield lambda model, chosen=chosen: F.cross_entropy(model(images[chosen]), labels[chosen])

    torch.manual_seed(seed)
    model = network(WIDTHS)
    result, _ = fliqs(
        model, losses(), lambda m: accuracy(m, held) / 100, (1, 14, 14), steps=STEPS, formats=formats,
        lr=4e-3, seed=seed,
    )  # fmt: skip
    return result


def run(check: Check) -> None:
    """Measure the claim."""
    floats = (E2M1, Float(3, 0), Float(2, 3), Float(3, 2), E4M3, E5M2, BFLOAT16)
    check.require(
        "numbers that 7 float formats round unlike a search of all codes",
        sum(map(wrong_roundings, floats)),
        "==",
        0,
    )
    levels = sum(
        len(Integer(bits, signed).grid()) == 2**bits for bits in range(2, 9) for signed in (True, False)
    )
    check.require("integer formats of 2 to 8 bits with 2^k levels", levels, "==", 14)
    _oracle(check)
    data, test = small_pictures(10_000, 4_000)
    ahead, behind, shares = [], [], []
    for seed in SEEDS:
        searched = _trained(seed, data, FORMATS)
        found = {
            name: layer.weight_quantizer.scheme.format for name, layer in quantized_layers(searched).items()
        }
        uniform = _trained(seed, data, (Integer(4),))
        retrained = _trained(seed, data, {name: (form,) for name, form in found.items()})
        score, plain, again = (accuracy(model, test) for model in (searched, uniform, retrained))
        shares.append(bit_operations(searched, (1, 14, 14)) / bit_operations(uniform, (1, 14, 14)))
        ahead.append(score - plain)
        behind.append(again - score)
        bits = [form.bits for form in found.values()]
        check.note(
            f"Seed {seed}: bits {bits}, searched {score:.2f}%, uniform {plain:.2f}%, retrained {again:.2f}%."
        )
    check.require(
        "bit operations over those of 4 bits, largest of 3 seeds", max(shares), "<=", 1 + COST_ERROR
    )
    check.require(
        "accuracy of the search over that of uniform 4 bits, mean of 3 seeds", statistics.mean(ahead), ">=", MARGIN,
        unit="points",
    )  # fmt: skip
    check.require(
        "accuracy of retraining over that of the weights of the search, mean of 3 seeds", statistics.mean(behind), "<",
        RETRAINED, unit="points",
    )  # fmt: skip
