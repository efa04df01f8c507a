"""AdaRound, AdaQuant, ZeroQ, FLIQS and what measures a layer's sensitivity, on small trained networks."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from omniconv.compress.quantize.adaquant import adapt_layer, adaquant
from omniconv.compress.quantize.adaround import adaround
from omniconv.compress.quantize.correct import layer_io
from omniconv.compress.quantize.fliqs import Policy, absolute_reward, fliqs, search_formats
from omniconv.compress.quantize.formats import Float, Integer
from omniconv.compress.quantize.layers import quantized_layers
from omniconv.compress.quantize.quantize import fake_quantize, quantize
from omniconv.compress.quantize.sensitivity import (
    alone,
    divergence,
    hessian_costs,
    hessian_traces,
    sensitivity,
)
from omniconv.compress.quantize.zeroq import distilled_images, statistics_loss, zeroq


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.BatchNorm2d(8),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


def pictures(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return stripes in one of four directions, with noise."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=random)
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(9.0), indexing="ij")
    angle, phase = (labels * torch.pi / 4)[:, None, None], 6 * torch.rand(count, 1, 1, generator=random)
    stripes = torch.sin(1.5 * (x * angle.cos() + y * angle.sin()) + phase)
    return (stripes + 0.3 * torch.randn(stripes.shape, generator=random))[:, None], labels


@pytest.fixture(scope="module")
def trained():
    model, (x, y) = network(), pictures(256, 0)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        loss = F.cross_entropy(model.train()(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_()


IMAGES, LABELS = pictures(128, 1)


def loss(model: nn.Module) -> torch.Tensor:
    return F.cross_entropy(model(IMAGES), LABELS)


@torch.no_grad()
def error(reference, model):
    return float((reference(IMAGES) - model(IMAGES)).square().mean())


def test_learned_rounding_is_nearer_than_the_nearest(trained):
    plain, _ = quantize(trained, IMAGES, weights=3, activations=None)
    model, report = adaround(trained, IMAGES, weights=3, activations=None, steps=80)
    assert error(trained, model) < 0.7 * error(trained, plain)
    assert report.method == "AdaRound"
    step = model[0].weight_quantizer.scale[:, None, None]
    fused = fake_quantize(trained, activations=None, weights=3)[0]._parameters["weight"]
    assert ((model[0].weight - fused).abs() <= step * 1.0001).all()


def test_adapted_layers_and_networks_are_nearer(trained):
    plain = fake_quantize(trained, IMAGES, weights=3, activations=4)
    inputs, wanted = layer_io(fake_quantize(trained, activations=None, weights=8), "3", IMAGES)
    before, after = adapt_layer(plain[3], inputs, wanted, steps=40)
    assert after < 0.8 * before
    with torch.no_grad():
        assert after == pytest.approx(float((plain[3](inputs) - wanted).square().mean()), rel=1e-3)
    plain, _ = quantize(trained, IMAGES, weights=3, activations=4)
    for sequential in (True, False):
        model, _ = adaquant(trained, IMAGES, weights=3, activations=4, steps=40, sequential=sequential)
        assert error(trained, model) < 0.7 * error(trained, plain)


def test_layers_are_measured_alone(trained):
    measure = divergence(trained, IMAGES)
    assert measure(trained) == pytest.approx(0, abs=1e-12)
    model = fake_quantize(trained, activations=None, weights=2)
    found = alone(model, measure)
    one = fake_quantize(trained, activations=None, weights={"3": 2})
    assert found["3"] == pytest.approx(measure(one))
    table = sensitivity(trained, measure, (2, 8))
    assert table.names == ("0", "3", "8")
    assert table.sizes == ((144, 576), (1152, 4608), (64, 256))
    assert all(two > eight >= -1e-9 for two, eight in table.costs)
    assert table.chosen([0, 1, 1]) == {"0": 2, "3": 8, "8": 8}


def test_traces_are_those_of_the_whole_hessian(trained):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(84, 4))
    traces = hessian_traces(model, loss, probes=400)
    weight = model[0].weight.detach().clone()

    def of(w):
        return loss(lambda x: model[2](F.conv2d(x, w, model[0].bias).flatten(1)))

    exact = torch.autograd.functional.hessian(of, weight).reshape(18, 18).trace()
    assert traces["0"] == pytest.approx(float(exact), rel=0.1)
    table = hessian_costs(model, traces, (2, 4))
    rounded = fake_quantize(model, weights=2, activations=None)[0].weight
    assert table.costs[0][0] == pytest.approx(
        traces["0"] / 18 * float((rounded - weight).detach().square().sum())
    )


def test_images_are_distilled_from_batch_norms(trained):
    images = distilled_images(trained, (1, 8, 9), count=16, steps=80)
    noise = torch.randn(16, 1, 8, 9, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        by_hand, x = [noise.mean() ** 2 + (noise.std(correction=0) - 1) ** 2], noise
        for layer in trained[:5]:
            if isinstance(layer, nn.BatchNorm2d):
                channels = x.transpose(0, 1).flatten(1)
                by_hand += [
                    (channels.mean(1) - layer.running_mean).square().mean(),
                    (channels.std(1, correction=0) - layer.running_var.sqrt()).square().mean(),
                ]
            x = layer(x)
        torch.testing.assert_close(statistics_loss(trained, noise), sum(by_hand), rtol=1e-4, atol=1e-6)
        assert statistics_loss(trained, images) < 0.1 * statistics_loss(trained, noise)
    model, report = zeroq(trained, (1, 8, 9), bits=4.0, steps=20)
    bits = [layer.weight_quantizer.bits * layer.weight.numel() for layer in quantized_layers(model).values()]
    assert sum(bits) <= 4 * sum(layer.weights for layer in report.layers)
    assert error(trained, model) < float(trained(IMAGES).detach().var())
    with pytest.raises(ValueError, match="no batch norm with running statistics"):
        distilled_images(nn.Sequential(nn.Conv2d(1, 1, 1)), (1, 4, 4))


def test_a_policy_finds_the_best_that_costs_what_it_may():
    quality = torch.tensor([[0.0, 0.3, 0.9], [0.0, 0.05, 0.1], [0.0, 0.02, 0.03]])
    costs = [[1.0, 2, 3], [1, 2, 3], [1, 2, 3]]

    def good(choices):
        return float(sum(quality[i, c] for i, c in enumerate(choices)))

    policy = Policy(3, 3, 800, seed=0)
    found = search_formats(good, costs, 5.0, policy)
    rewards = {
        choices: absolute_reward(good(choices), 3 + sum(choices), 5.0)
        for choices in itertools.product(range(3), repeat=3)
    }
    assert tuple(found) == max(rewards, key=rewards.get)
    assert policy.probabilities().amax(1).min() > 0.9


def test_formats_are_searched_while_weights_learn(trained):
    batches = [pictures(64, seed) for seed in range(2, 6)]
    losses = [lambda m, x=x, y=y: F.cross_entropy(m(x), y) for x, y in batches]
    score = lambda m: float((m(IMAGES).argmax(1) == LABELS).float().mean())  # noqa: E731
    formats = (Float(2, 1), Integer(4), Integer(8))
    model, report = fliqs(trained, losses, score, (1, 8, 9), steps=40, formats=formats, bits=5.0)
    assert score(model) > 0.7
    assert {layer.weight_quantizer.scheme.format for layer in quantized_layers(model).values()} <= set(
        formats
    )
    assert report.after.bytes < report.before.bytes
    again, _ = fliqs(
        trained, losses, score, (1, 8, 9), steps=3, bits=4.0,
        formats={"0": (Integer(8),), "3": (Integer(3),), "8": (Float(2, 1),)},
    )  # fmt: skip
    assert [layer.weight_quantizer.bits for layer in quantized_layers(again).values()] == [8, 3, 4]
