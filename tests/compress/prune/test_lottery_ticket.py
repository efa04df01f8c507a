import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from omniconv.compress.prune.global_magnitude import magnitudes
from omniconv.compress.prune.lottery_ticket import (
    conv_network,
    drop_smallest,
    lenet_300_100,
    rounds,
    smallest_of_all,
    smallest_of_layers,
)
from omniconv.compress.prune.masks import prunable_weights

X = torch.randn(32, 12, generator=torch.Generator().manual_seed(1))
Y = torch.arange(32) % 3


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 3))


def train(model: nn.Module) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        optimizer.step()
    return loss.item()


def left(masks) -> list[int]:
    return [int(mask.sum()) for mask in masks.values()]


def test_each_round_starts_from_the_first_weights_of_the_survivors():
    model = network()
    start = copy.deepcopy(model.state_dict())
    starts, ends = [], []

    def watched(model: nn.Module) -> float:
        starts.append(copy.deepcopy(model.state_dict()))
        loss = train(model)
        ends.append(copy.deepcopy(model.state_dict()))
        return loss

    done = list(rounds(model, watched, smallest_of_layers(0.2, {"3": 0.1}), 3))
    assert [round_.density for round_ in done] == pytest.approx(
        [sum(left(round_.masks)) / 600 for round_ in done]
    )
    assert [left(round_.masks) for round_ in done] == [[480, 120], [384, 108], [307, 97], [246, 87]]
    for round_, before, after in zip(done, starts, ends, strict=True):
        for name, mask in round_.masks.items():
            assert torch.equal(before[f"{name}.weight"], start[f"{name}.weight"] * mask)
            assert (after[f"{name}.weight"][~mask] == 0).all()
            assert not torch.equal(after[f"{name}.weight"], before[f"{name}.weight"])
        # Biases and norms with their statistics go back too.
        for key in ("0.bias", "1.weight", "1.running_mean", "1.num_batches_tracked"):
            assert torch.equal(before[key], start[key])
    for (name, new), (_, old) in zip(done[1].masks.items(), done[0].masks.items(), strict=True):
        trained = ends[0][f"{name}.weight"].abs()
        assert trained[new].min() >= trained[old & ~new].max()
    assert done[-1].result == pytest.approx(F.cross_entropy(model(X), Y).item(), abs=0.3)


def test_it_prunes_as_torch_does():
    ours, theirs = network(), network()
    masks = {name: torch.ones_like(value, dtype=torch.bool) for name, value in magnitudes(ours).items()}
    for _ in range(3):
        masks = smallest_of_layers(0.2)(ours, masks)
        for i in (0, 3):
            prune.l1_unstructured(theirs[i], "weight", 0.2)
    for i in (0, 3):
        assert torch.equal(masks[str(i)], theirs[i].weight_mask.bool())


def test_rewinding_to_a_later_state():
    model = network()
    train(model)
    later = copy.deepcopy(model.state_dict())
    starts = []

    def watched(model: nn.Module) -> None:
        starts.append(copy.deepcopy(model.state_dict()))
        train(model)

    done = list(rounds(network(), watched, smallest_of_all(0.5), 1, rewind=later))
    mask = done[1].masks["0"]
    assert torch.equal(starts[1]["0.weight"], later["0.weight"] * mask)
    assert torch.equal(starts[0]["0.weight"], network()[0].weight)


def test_smallest_of_all_takes_one_threshold_and_any_score():
    model = network()
    masks = {name: torch.ones_like(value, dtype=torch.bool) for name, value in magnitudes(model).items()}
    for expected in (480, 384, 307):
        masks = smallest_of_all(0.2)(model, masks)
        assert sum(left(masks)) == expected
    scores = magnitudes(model)
    worst = min(float(scores[name][mask].min()) for name, mask in masks.items())
    assert worst >= max(float(scores[name][~mask].max()) for name, mask in masks.items())
    largest = smallest_of_all(0.2, lambda m: {n: -w.detach().abs() for n, w in prunable_weights(m).items()})
    gone = {name: mask & ~largest(model, masks)[name] for name, mask in masks.items()}
    assert sum(left(gone)) == round(0.2 * 307)
    assert float(scores["0"][gone["0"]].min()) > worst


def test_drop_smallest_never_revives():
    masks = {"a": torch.tensor([True, False, True, True]), "b": torch.tensor([False, True])}
    scores = {"a": torch.tensor([5.0, 9.0, 1.0, 4.0]), "b": torch.tensor([9.0, 2.0])}
    kept = drop_smallest(scores, masks, 2)
    assert kept["a"].tolist() == [True, False, False, True]
    assert kept["b"].tolist() == [False, False]


def test_the_networks_of_the_paper():
    counts = [
        sum(p.numel() for p in m.parameters()) for m in (lenet_300_100(), conv_network(2), conv_network(4))
    ]
    assert counts == [266_610, 4_301_642, 2_425_930]
    assert conv_network(6)(torch.randn(1, 3, 32, 32)).shape == (1, 10)
    assert lenet_300_100(64)(torch.randn(2, 1, 8, 8)).shape == (2, 10)
    with pytest.raises(ValueError, match="depth must be 2, 4 or 6: got 3"):
        conv_network(3)
