import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from omniconv.compress.prune.global_magnitude import global_magnitude, magnitude_masks
from omniconv.compress.prune.masks import MaskKeeper, hold_masks, keep_largest, prunable_weights, smallest


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(16, 3)
    )


X = torch.randn(64, 1, 6, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(64) % 3

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.5),
    "adam": lambda p: torch.optim.Adam(p, 1e-2, weight_decay=0.5, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.9),
    "lbfgs": lambda p: torch.optim.LBFGS(p, max_iter=3),
}


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int, after=None) -> None:
    model.train()
    for _ in range(count):

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(model(X), Y)
            loss.backward()
            return loss

        optimizer.step(closure)
        if after is not None:
            after()


def test_prunable_are_the_weights_of_convolutions_and_linear_layers():
    model = nn.ModuleDict(
        {
            "a": nn.Conv1d(2, 2, 1),
            "b": nn.ConvTranspose3d(2, 2, 1),
            "c": nn.Linear(2, 2),
            "d": nn.BatchNorm2d(2),
            "e": nn.LayerNorm(2),
            "f": nn.Embedding(2, 2),
        }
    )
    assert list(prunable_weights(model)) == ["a", "b", "c"]
    assert list(prunable_weights(model, ["c"])) == ["c"]


def test_shared_weights_count_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert list(prunable_weights(model)) == ["0"]
    pruned, _ = global_magnitude(model, 0.5)
    assert pruned[0].weight is pruned[1].weight
    assert int((pruned[1].weight == 0).sum()) == 8


def test_what_cannot_be_pruned_is_named():
    with pytest.raises(ValueError, match="no convolution or linear layer to prune"):
        prunable_weights(nn.ReLU())
    with pytest.raises(
        ValueError, match=r"'3x' is no convolution or linear layer of this model; did you mean 3\?"
    ):
        prunable_weights(network(), ["3x"])
    with pytest.raises(ValueError, match=r"0\.weight is computed"):
        prunable_weights(nn.Sequential(parametrizations.weight_norm(nn.Linear(2, 2))))
    broken = network()
    broken[3].weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"3\.weight is not finite"):
        prunable_weights(broken)


@settings(deadline=None)
@given(values=st.lists(st.integers(0, 5), min_size=1, max_size=60), share=st.floats(0, 1))
def test_smallest_is_the_stable_sort(values, share):
    count = round(share * len(values))
    expected = sorted(range(len(values)), key=lambda i: values[i])[:count]
    assert smallest(torch.tensor(values).float(), count).nonzero().squeeze(1).tolist() == sorted(expected)


@settings(deadline=None, max_examples=200)
@given(
    layers=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=30), min_size=1, max_size=5),
    sparsity=st.floats(0, 0.999),
    floor=st.integers(0, 12),
)
def test_masks_are_exact_hold_the_floor_and_equal_a_slow_reference(layers, sparsity, floor):
    scores = {str(i): torch.tensor(layer).float() for i, layer in enumerate(layers)}
    total = sum(map(len, layers))
    count = round(sparsity * total)
    # Reference: in ascending order, a weight goes while its layer has more than the floor.
    order = sorted((value, i, j) for i, layer in enumerate(layers) for j, value in enumerate(layer))
    kept = [[True] * len(layer) for layer in layers]
    gone = 0
    for _, i, j in order:
        if gone < count and sum(kept[i]) > floor:
            kept[i][j] = False
            gone += 1
    if gone < count:
        with pytest.raises(ValueError, match="lower one of them"):
            keep_largest(scores, sparsity, floor)
        return
    masks = keep_largest(scores, sparsity, floor)
    assert [mask.tolist() for mask in masks.values()] == kept
    assert sum(int((~mask).sum()) for mask in masks.values()) == count


@pytest.mark.parametrize("sparsity", [-0.1, 1, 1.5, float("nan")])
def test_impossible_sparsity(sparsity):
    with pytest.raises(ValueError, match="sparsity must lie in"):
        keep_largest({"a": torch.ones(3)}, sparsity)


def test_negative_floor():
    with pytest.raises(ValueError, match="min_weights must not be negative: got -1"):
        keep_largest({"a": torch.ones(3)}, 0.5, -1)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("by_hand", [False, True])
def test_no_optimizer_revives_a_weight(name, by_hand):
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    # Momentum from before the pruning is the hard case.
    steps(model, optimizer, 3)
    pruned, _ = global_magnitude(model, 0.8)
    model.load_state_dict(pruned.state_dict())
    masks = {name: weight != 0 for name, weight in prunable_weights(model).items()}
    before = copy.deepcopy(model)
    with hold_masks(model, None if by_hand else optimizer) as keeper:
        steps(model, optimizer, 5, keeper.apply if by_hand else None)
    for layer, mask in masks.items():
        weight = model.get_submodule(layer).weight
        assert (weight[~mask] == 0).all()
        assert not torch.equal(weight, before.get_submodule(layer).weight)


def test_without_holding_momentum_does_revive():
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    steps(model, optimizer, 3)
    pruned, _ = global_magnitude(model, 0.8)
    model.load_state_dict(pruned.state_dict())
    zeros = sum(int((w == 0).sum()) for w in prunable_weights(model).values())
    steps(model, optimizer, 1)
    assert sum(int((w == 0).sum()) for w in prunable_weights(model).values()) < zeros / 2


@pytest.mark.parametrize("clip", [False, True])
def test_fine_tuning_equals_that_of_torch_prune(clip):
    ours = network()
    theirs = network()
    layers = [(m, "weight") for m in theirs if isinstance(m, nn.Conv2d | nn.Linear)]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=0.7)
    ours, _ = global_magnitude(ours, 0.7)
    hold_masks(ours)
    for model in (ours, theirs):
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for _ in range(6):
            optimizer.zero_grad()
            F.cross_entropy(model(X), Y).backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(a, nn.Conv2d | nn.Linear):
            torch.testing.assert_close(a.weight, b.weight_orig * b.weight_mask)


def test_after_release_weights_are_free():
    model, _ = global_magnitude(network(), 0.8)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    with hold_masks(model, optimizer):
        steps(model, optimizer, 2)
    held = sum(int((w == 0).sum()) for w in prunable_weights(model).values())
    steps(model, optimizer, 2)
    assert sum(int((w == 0).sum()) for w in prunable_weights(model).values()) < held


def test_update_holds_the_new_masks():
    model = network()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    keeper = MaskKeeper(model, magnitude_masks(model, 0.0), optimizer)
    total = sum(w.numel() for w in prunable_weights(model).values())
    dropped = {name: torch.zeros_like(mask) for name, mask in keeper.masks.items()}
    for sparsity in (0.3, 0.6, 0.9):
        keeper.update(magnitude_masks(model, sparsity))
        # What was pruned stays so.
        assert all((~keeper.masks[name])[gone].all() for name, gone in dropped.items())
        dropped = {name: ~mask for name, mask in keeper.masks.items()}
        steps(model, optimizer, 2)
        zeros = sum(int((w == 0).sum()) for w in prunable_weights(model).values())
        assert zeros == round(sparsity * total)
    with pytest.raises(ValueError, match="masks must be of the layers held"):
        keeper.update({})


def test_frozen_weights_and_other_layers():
    model, _ = global_magnitude(network(), 0.5, layers=["3"])
    model[0].weight.requires_grad_(False)
    frozen = model[0].weight.clone()
    optimizer = OPTIMIZERS["sgd"]([p for p in model.parameters() if p.requires_grad])
    with hold_masks(model, optimizer):
        steps(model, optimizer, 3)
    assert torch.equal(model[0].weight, frozen)
    assert int((model[3].weight == 0).sum()) == 108
    assert (model[5].weight != 0).all()


def test_a_held_model_can_be_copied():
    model, _ = global_magnitude(network(), 0.5)
    hold_masks(model)
    twin = copy.deepcopy(model)
    F.cross_entropy(twin(X), Y).backward()
    assert (twin[0].weight.grad[twin[0].weight == 0] != 0).any()
