"""Early exits: thresholds 0 and 1 are the first and the last exit to the bit, a batch is its samples one by one."""

import copy

import pytest
import torch
from scipy.stats import entropy
from torch import nn
from torch.nn import functional as F

from omniconv.compress.adaptive.early_exit import (
    EarlyExits,
    ExitHead,
    add_exits,
    calibrate,
    confidence,
    exit_loss,
    taken_exits,
)
from omniconv.design.cost import count_cost
from omniconv.models.factory import create_model

EXITS = {"resnet_test": None, "vit_test": ("blocks.0",), "twins_test": ("maps.0",)}


def made(name: str = "resnet_test") -> EarlyExits:
    torch.manual_seed(0)
    model = create_model(name, num_classes=5).eval()
    network = add_exits(model, torch.randn(2, 3, 32, 40), 5, EXITS[name])
    for p in network.parameters():
        nn.init.normal_(p, std=0.3) if p.ndim > 1 else None
    return network.eval()


def images(count: int = 9) -> torch.Tensor:
    return torch.randn(count, 3, 32, 40, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", EXITS)
@torch.no_grad()
def test_thresholds_0_and_1_are_the_first_and_the_last_exit_bit_for_bit(name):
    network, x = made(name), images()
    every = network.forward_exits(x)
    assert torch.equal(every[-1], network.model(x))
    network.set_threshold(1.0)
    logits, taken = network.infer(x)
    assert torch.equal(logits, every[-1])
    assert taken.unique().tolist() == [len(every) - 1]
    network.set_threshold(0.0)
    logits, taken = network.infer(x)
    assert torch.equal(logits, every[0])
    assert taken.unique().tolist() == [0]


@pytest.mark.parametrize("name", EXITS)
@torch.no_grad()
def test_a_batch_is_its_samples_one_by_one(name):
    network, x = made(name).double(), images().double()
    every = torch.stack(network.forward_exits(x))
    network.set_threshold(float(confidence(every[0]).sort().values[4:6].mean()))
    logits, taken = network.infer(x)
    assert 1 < len(taken.unique())
    for index in range(len(x)):
        one, where = network.infer(x[index : index + 1])
        assert where[0] == taken[index]
        torch.testing.assert_close(one[0], logits[index])
        torch.testing.assert_close(one[0], every[taken[index], index])
    assert torch.equal(taken, taken_exits(list(every), network.thresholds))
    torch.testing.assert_close(network(x), logits)


@torch.no_grad()
def test_who_left_is_not_computed_further():
    network, x = made(), images()
    every = network.forward_exits(x)
    network.set_threshold(float(confidence(every[0]).median()))
    seen = []
    handle = network.model.layer3.register_forward_hook(lambda m, a, y: seen.append(len(y)))
    _, taken = network.infer(x)
    handle.remove()
    assert seen == [int((taken >= 3).sum())]
    network.set_threshold(0.0)
    network.model.layer2.register_forward_hook(lambda m, a, y: pytest.fail("computed for nobody"))
    network.infer(x)


def test_nothing_stays_behind():
    network = made()
    network.set_threshold(0.0)
    network(images())
    assert not any(m._forward_hooks for m in network.modules())
    torch.testing.assert_close(copy.deepcopy(network)(images()), network(images()))


def test_confidence_against_scipy():
    logits = torch.randn(6, 4, dtype=torch.float64)
    p = logits.softmax(1)
    ranked = p.sort(1).values
    torch.testing.assert_close(confidence(logits, "softmax"), ranked[:, -1])
    torch.testing.assert_close(confidence(logits, "margin"), ranked[:, -1] - ranked[:, -2])
    wanted = 1 - torch.tensor(entropy(p.numpy(), base=4, axis=1))
    torch.testing.assert_close(confidence(logits, "entropy"), wanted)
    for kind in ("softmax", "entropy", "margin"):
        sure = confidence(torch.tensor([[0.0, 0, 0], [1e4, 0, -1e4]]), kind)
        assert 0 < sure[0] <= 0.34
        assert sure[1] == 1


@pytest.mark.parametrize("kind", ["softmax", "entropy", "margin"])
@pytest.mark.parametrize("drop", [0.0, 0.03, 1.0])
def test_calibration_is_the_best_of_all_thresholds(kind, drop):
    random = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 4, (150,), generator=random)
    outputs = [k * F.one_hot(labels, 4) + torch.randn(150, 4, generator=random) for k in (1.0, 1.5, 2.0)]
    macs = (1.0, 2.0, 5.0)
    found = calibrate(outputs, labels, macs, drop, kind)

    def measure(threshold: float) -> tuple[float, float]:
        taken = taken_exits(outputs, threshold, kind)
        answers = torch.stack(outputs)[taken, torch.arange(150)].argmax(1)
        return float((answers == labels).double().mean()), sum(macs[e] for e in taken.tolist()) / 150

    assert (found.accuracy, found.macs) == pytest.approx(measure(found.threshold))
    values = torch.cat([torch.zeros(1), *(confidence(logits, kind) for logits in outputs[:-1])])
    tried = [measure(float(v)) for v in [*values, 1.0]]
    full = float((outputs[-1].argmax(1) == labels).double().mean())
    assert found.full_accuracy == pytest.approx(full)
    assert found.macs == pytest.approx(min(cost for hit, cost in tried if hit >= full - drop - 1e-9))
    assert sum(found.shares) == pytest.approx(1)


def test_multiply_adds_of_every_exit():
    network = made()
    macs = network.exit_macs((3, 32, 40))
    heads = sum(head.fc.weight.numel() for head in network.heads)
    assert macs[-1] == count_cost(network.model, (3, 32, 40)).macs + heads
    # The stem, a 3x3 convolution from 3 to 8 channels, and its head.
    assert macs[0] == network.model.conv1.weight.numel() * 32 * 40 + network.heads[0].fc.weight.numel()
    assert list(macs) == sorted(macs)


def test_joint_training_reaches_every_weight_and_staged_only_the_heads():
    network = made().train()
    labels = torch.arange(9) % 5
    outputs = network(images())
    loss = exit_loss(outputs, labels, weights=(0.5, 1, 2, 0))
    wanted = sum(w * F.cross_entropy(z, labels) for w, z in zip((0.5, 1, 2), outputs[:-1], strict=True))
    torch.testing.assert_close(loss, wanted)
    exit_loss(outputs, labels).backward()
    assert all(p.grad is not None for p in network.parameters())
    network.zero_grad()
    exit_loss(network.forward_exits(images(), detach=True)[:-1], labels).backward()
    assert all(p.grad is None for p in network.model.parameters())
    assert all(p.grad is not None for p in network.heads.parameters())


def test_errors():
    model = create_model("resnet_test", num_classes=5)
    head = ExitHead(8, 5)
    with pytest.raises(ValueError, match="heads: the model has no module 'layer9'"):
        EarlyExits(model, {"layer9": head})
    with pytest.raises(ValueError, match="heads must name at least one exit"):
        EarlyExits(model, {})
    with pytest.raises(ValueError, match="threshold must be one number or 1: got 2"):
        EarlyExits(model, {"layer1": head}, threshold=(0.1, 0.2))
    with pytest.raises(ValueError, match="heads must follow the order in which modules run once"):
        EarlyExits(model, {"layer2": ExitHead(16, 5), "layer1": head}).forward_exits(images())
    with pytest.raises(ValueError, match="confidence needs at least two classes: got 1"):
        confidence(torch.zeros(3, 1))
    with pytest.raises(ValueError, match="confidence must be softmax, entropy or margin: got 'max'"):
        confidence(torch.zeros(3, 2), "max")
    with pytest.raises(ValueError, match="Sequential has no feature_info: name the modules in exits"):
        add_exits(nn.Sequential(nn.Linear(2, 2)), torch.zeros(1, 2), 2)
