import pytest
import torch
from torch import nn

from omniconv.compress.prune.masks import hold_masks, keep_largest, prunable_weights
from omniconv.compress.prune.random_prune import random_masks, random_prune, random_prune_like
from omniconv.compress.prune.ratios import (
    erdos_renyi_densities,
    erk_densities,
    layer_counts,
    uniform_densities,
    uniform_plus_densities,
)
from omniconv.models.factory import create_model

RULES = [uniform_densities, uniform_plus_densities, erdos_renyi_densities, erk_densities]


def made() -> nn.Module:
    torch.manual_seed(0)
    return create_model("resnet_test", num_classes=10)


def counts(model: nn.Module) -> dict[str, int]:
    return {name: int(weight.count_nonzero()) for name, weight in prunable_weights(model).items()}


@pytest.mark.parametrize("rule", RULES)
def test_layers_keep_what_the_rule_says_whatever_the_weights(rule):
    model = made()
    weights = prunable_weights(model)
    expected = layer_counts(rule, {name: weight.shape for name, weight in weights.items()}, 0.8)
    pruned, report = random_prune(model, 0.8, rule=rule)
    assert counts(pruned) == expected
    total = sum(weight.numel() for weight in weights.values())
    assert sum(layer.nonzero for layer in report.layers) == total - round(0.8 * total)
    # Magnitudes play no part: on average a survivor is as large as any other.
    name = max(expected, key=lambda name: expected[name])
    kept = prunable_weights(pruned)[name]
    ratio = float((kept[kept != 0].abs().mean() / weights[name].abs().mean()).detach())
    assert ratio == pytest.approx(1, abs=0.1)


def test_every_place_is_as_likely():
    shapes, kept = {"a": (6, 5)}, {"a": 9}
    mean = torch.stack([random_masks(shapes, kept, seed)["a"].float() for seed in range(400)]).mean(0)
    # Four standard deviations of a mean of 400 draws of probability 0.3.
    assert (mean - 0.3).abs().max() < 4 * (0.21 / 400) ** 0.5


def test_the_seed_decides():
    model = made()
    first, again, other = (random_prune(model, 0.5, seed=seed)[0] for seed in (0, 0, 1))
    masks = [[weight != 0 for weight in prunable_weights(m).values()] for m in (first, again, other)]
    assert all(torch.equal(a, b) for a, b in zip(masks[0], masks[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(masks[0], masks[2], strict=True))


def test_borrowed_ratios_keep_the_counts_and_not_the_places():
    model = made()
    scores = {name: weight.detach().abs() for name, weight in prunable_weights(model).items()}
    masks = keep_largest(scores, 0.9)
    pruned, _ = random_prune_like(model, masks)
    assert counts(pruned) == {name: int(mask.sum()) for name, mask in masks.items()}
    same = sum(
        int((mask & (weight != 0)).sum())
        for mask, weight in zip(masks.values(), prunable_weights(pruned).values(), strict=True)
    )
    assert same < 0.5 * sum(counts(pruned).values())


def test_sparse_training_keeps_the_mask():
    model, _ = random_prune(made(), 0.9)
    before = {name: weight == 0 for name, weight in prunable_weights(model).items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
    x, y = torch.randn(4, 3, 32, 32), torch.arange(4)
    with hold_masks(model, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert all((weight[before[name]] == 0).all() for name, weight in prunable_weights(model).items())
