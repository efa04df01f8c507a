"""Dynamic token pruning: masking is removal, every token is predicted once, and nobody leaves at threshold 1."""

import pytest
import torch

from omniconv.compress.adaptive.dtop import DynamicTokenPruning, decided_tokens
from omniconv.compress.adaptive.early_exit import exit_loss
from omniconv.design.cost import count_cost
from omniconv.models.dense.segmenter import Segmenter
from omniconv.models.factory import create_model

# Of new weights, nobody is very sure.
SURE = 0.5


def made(name: str = "deit_test", **options) -> DynamicTokenPruning:
    torch.manual_seed(0)
    segmenter = Segmenter(create_model(name, depth=5), 4)
    network = DynamicTokenPruning(segmenter, (1, 3), **options).double().eval()
    for p in network.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.2)
    return network


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 48, 60, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@torch.no_grad()
@pytest.mark.parametrize("name", ["deit_test", "vit_test"])
def test_at_threshold_1_it_is_the_segmenter(name):
    network = made(name, threshold=1.0)
    logits, taken = network.infer(images())
    torch.testing.assert_close(logits, network.segmenter(images()), rtol=0, atol=1e-12)
    assert (taken == 2).all()
    torch.testing.assert_close(network.forward_exits(images())[-1], logits, rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("keep", [0, 5])
@pytest.mark.parametrize("threshold", [0.0, SURE])
def test_masked_tokens_count_as_little_as_removed_ones(threshold, keep):
    network = made(threshold=threshold, keep=keep)
    logits, taken = network.infer(images())
    masked = network.forward_masked(images())
    torch.testing.assert_close(masked[-1], logits, rtol=0, atol=1e-12)
    assert len(masked) == 3
    if threshold == SURE:
        assert taken.unique().tolist() == [0, 1, 2]


@torch.no_grad()
def test_every_token_is_predicted_once_by_the_exit_that_it_took():
    network = made(threshold=SURE, keep=1)
    seen = []
    last = network.segmenter.head
    last.register_forward_hook(lambda m, a, y: seen.append(y.shape[1]))
    logits, taken = network.infer(images())
    assert sum(seen) == int((taken == 2).sum())
    first = network.forward_exits(images())[0]
    grid = (taken == 0).unflatten(1, (6, 8)).double()[:, None]
    # Inside a patch whose neighbours left at the same exit, the picture is that exit's.
    alike = 1 - torch.nn.functional.max_pool2d(1 - grid, 3, 1, 1)
    alike = alike.repeat_interleave(8, 2).repeat_interleave(8, 3)[..., :60].expand(-1, 4, -1, -1) > 0
    assert alike.any()
    torch.testing.assert_close(logits[alike], first[alike])


def test_the_surest_of_every_class_stay():
    random = torch.Generator().manual_seed(2)
    scores = 2 * torch.randn(2, 40, 3, generator=random)
    left = torch.rand(2, 40, generator=random) < 0.8
    found = decided_tokens(scores, 0.6, 3, left)
    for n in range(2):
        sure, classes = scores[n].softmax(1).max(1)
        wanted = torch.zeros(40, dtype=torch.bool)
        for c in range(3):
            clear = [p for p in range(40) if sure[p] > 0.6 and left[n, p] and classes[p] == c]
            for p in sorted(clear, key=lambda p: -sure[p])[3:]:
                wanted[p] = True
        assert torch.equal(found[n], wanted)
        assert wanted.any()
    assert torch.equal(decided_tokens(scores, 0.6, 0), scores.softmax(2).amax(2) > 0.6)
    assert not decided_tokens(scores, 1.0, 0).any()


def test_cost_falls_with_the_threshold():
    costs = []
    for threshold in (1.0, SURE, 0.0):
        network = made(threshold=threshold)
        costs.append(sum(network.image_macs(images())))
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < costs[0]
    whole = count_cost(made().segmenter.float(), (3, 48, 60)).macs
    heads = 2 * 6 * 8 * 32 * 4
    assert costs[0] == 3 * (whole + heads)


def test_training_has_a_gradient_everywhere():
    network = made(threshold=SURE, keep=0).train()
    masks = torch.randint(0, 4, (3, 48, 60))
    for outputs in (network.forward_exits(images()), network(images())):
        network.zero_grad()
        exit_loss(outputs, masks).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_errors():
    segmenter = Segmenter(create_model("vit_test", depth=4), 3)
    for exits in ((), (0, 2), (2, 1), (4,)):
        with pytest.raises(ValueError, match="exits must rise between 1 and 3"):
            DynamicTokenPruning(segmenter, exits)
    local = Segmenter(create_model("convit_test"), 3)
    with pytest.raises(
        ValueError, match="attention behind an exit must not depend on places: use later exits"
    ):
        DynamicTokenPruning(local, (1,))
