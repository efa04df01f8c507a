import pytest
import torch
from torch import nn

from omniconv.compress.quantize.correct import correct_bias, distil, layer_io, run_order, standardize
from omniconv.compress.quantize.equalize import equalizable_pairs, equalize
from omniconv.compress.quantize.formats import Integer
from omniconv.compress.quantize.layers import quantized_layers
from omniconv.compress.quantize.quantize import fake_quantize
from omniconv.compress.quantize.quantizer import Scheme
from omniconv.layers.conv.norm_folding import fold_batch_norms
from omniconv.models.factory import create_model


@pytest.fixture
def images():
    return torch.randn(24, 3, 9, 11, generator=torch.Generator().manual_seed(1)) + 0.5


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(8, 6, 1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4, bias=False),
    ).eval()  # fmt: skip


def moments(x):
    channels = x.transpose(0, 1).flatten(1)
    return channels.mean(1), channels.std(1, correction=0)


@pytest.mark.parametrize("correct", [correct_bias, standardize])
def test_channels_have_the_moments_of_the_float_ones(images, correct):
    reference = network()
    model = fake_quantize(reference, images, weights=3, activations=4)
    codes = {
        name: q.weight_quantizer.encode(q._parameters["weight"])
        for name, q in quantized_layers(model).items()
    }
    correct(model, reference, images)
    for name, layer in quantized_layers(model).items():
        wanted, got = (moments(layer_io(net, name, images)[1]) for net in (reference, model))
        torch.testing.assert_close(got[0], wanted[0], rtol=1e-3, atol=1e-4)
        if correct is standardize:
            torch.testing.assert_close(got[1], wanted[1], rtol=1e-3, atol=1e-4)
        assert torch.equal(layer.weight_quantizer.encode(layer._parameters["weight"]), codes[name])
    coarse = fake_quantize(reference, images, weights=Scheme(Integer(4)))
    with pytest.raises(ValueError, match="quantize weights with per='channel'"):
        standardize(coarse, reference, images)


def test_layers_are_seen_in_order(images):
    model = fake_quantize(network(), images)
    assert run_order(model, images) == ["0", "2", "5", "9"]
    inputs, outputs = layer_io(network(), "2", images)
    torch.testing.assert_close(inputs, network()[:2](images))
    torch.testing.assert_close(outputs, network()[:3](images))


def test_biases_learn_the_teacher_s_answers(images):
    reference = network()
    model = fake_quantize(reference, images, weights=3, activations=4)
    biases = [layer.bias for layer in quantized_layers(model).values() if layer.bias is not None]

    @torch.no_grad()
    def loss():
        target = reference(images).log_softmax(1)
        return nn.functional.kl_div(
            model(images).log_softmax(1), target, reduction="batchmean", log_target=True
        )

    before = float(loss())
    distil(model, reference, images, biases, steps=60, lr=1e-2)
    assert float(loss()) < 0.7 * before
    assert all(p.grad is None for p in model.parameters())


def test_equalized_networks_compute_the_same(images):
    model = network()
    with torch.no_grad():
        model[0].weight.mul_(torch.logspace(-2, 2, 8)[:, None, None, None])
        model[5].weight.div_(torch.logspace(-2, 2, 8)[:, None, None])
    assert equalizable_pairs(model) == [("0", "2"), ("2", "5")]
    same = equalize(model)
    torch.testing.assert_close(same(images), model(images), rtol=1e-4, atol=1e-5)
    for first, second in ((0, 2), (2, 5)):
        one = same[first].weight.flatten(1).abs().amax(1)
        groups = same[second].groups
        two = same[second].weight.reshape(groups, -1, same[second].weight.shape[1], 1 if second == 5 else 9)
        torch.testing.assert_close(one, two.abs().amax((1, 3)).flatten(), rtol=1e-2, atol=1e-4)
    scheme = Scheme(Integer(8))
    errors = [
        float((fake_quantize(net, weights=scheme, activations=None)(images) - model(images)).detach().norm())
        for net in (model, same)
    ]
    assert errors[1] < 0.3 * errors[0]


def test_a_resnet_is_equalized_between_its_residuals():
    model = create_model("resnet_test", num_classes=5).eval()
    x = torch.randn(2, 3, 33, 40)
    pairs = equalizable_pairs(fold_batch_norms(model))
    assert ("layer1.0.conv1", "layer1.0.conv2") in pairs
    assert all(first.startswith("layer") for first, _ in pairs)
    with torch.no_grad():
        torch.testing.assert_close(equalize(model)(x), model(x), rtol=1e-3, atol=1e-4)
