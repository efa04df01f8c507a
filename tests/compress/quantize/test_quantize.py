import copy
import pickle

import pytest
import torch
from torch import nn

from omniconv.compress.quantize.bench import bench, weight_bytes
from omniconv.compress.quantize.formats import Codebook, Integer
from omniconv.compress.quantize.layers import freeze, quantized_layers
from omniconv.compress.quantize.quantize import bit_operations, fake_quantize, quantize
from omniconv.compress.quantize.quantizer import Scheme
from omniconv.core.weights import load_weights, save_weights
from omniconv.models.factory import create_model


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 6, 3, groups=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    )  # fmt: skip
    with torch.no_grad():
        model.train()(torch.randn(16, 3, 9, 7) * 2 + 1)
    return model.eval()


@pytest.fixture
def images():
    return torch.randn(20, 3, 9, 7, generator=torch.Generator().manual_seed(1)) * 2 + 1


def test_a_layer_is_its_equation(images):
    model = network()
    quantized = fake_quantize(model, images, weights=4, activations=8)
    conv, norm, quant = model[0], model[1], quantized[0]
    gain = norm.weight / (norm.running_var + norm.eps).sqrt()
    weight = conv.weight * gain[:, None, None, None]
    bias = norm.bias - norm.running_mean * gain
    step = quant.weight_quantizer.scale.flatten()[:, None, None, None]
    rounded = (weight / step).round().clamp(-8, 7) * step
    source = quant.input_quantizer
    inputs = ((images / source.scale + source.zero).round().clamp(0, 255) - source.zero) * source.scale
    expected = nn.functional.conv2d(inputs, rounded, bias)
    torch.testing.assert_close(quantized[:1](images), expected, rtol=1e-4, atol=1e-5)
    assert isinstance(quant, nn.Conv2d)
    assert isinstance(quantized[1], nn.Identity)
    assert quantized[3].weight_quantizer.scale.shape == (3, 1)


def test_codes_are_what_the_file_holds(images, tmp_path):
    model, report = quantize(
        network(), images, weights={"0": 4, "3": 3, "7": Scheme(Codebook(2))}, activations=None
    )
    state = model.state_dict()
    assert len(state["0.weight_codes"]) == 8 * 27 * 4 // 8
    assert len(state["3.weight_codes"]) == 8 * 3 * 9 * 3 // 8
    assert len(state["7.weight_codes"]) == -(-30 * 2 // 8)
    assert "0.weight" not in state
    assert weight_bytes(model) == 108 + 81 + 8 + 4 * 8 + 4 * 3 + 4 + 4 * 4
    assert report.after.bytes < report.before.bytes
    save_weights(tmp_path / "w.safetensors", state)
    other = network()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.3).add_(0.01)
    other, _ = quantize(other, weights={"0": 4, "3": 3, "7": Scheme(Codebook(2))}, activations=None)
    other.load_state_dict(load_weights(tmp_path / "w.safetensors")[0])
    assert torch.equal(other(images), model(images))
    assert len(model[0].weight.detach()[0].unique()) <= 16


def test_frozen_computes_what_was_fake_quantized(images):
    fake = fake_quantize(network(), images, weights=5, activations=6)
    torch.testing.assert_close(freeze(fake)(images), fake(images))
    for twin in (copy.deepcopy(fake), pickle.loads(pickle.dumps(freeze(fake)))):
        torch.testing.assert_close(twin(images), fake(images))


def test_a_fake_quantized_model_learns(images):
    model = fake_quantize(network(), images, weights=2, activations=3, fold=False, learn_scales=True).train()
    assert isinstance(model[1], nn.BatchNorm2d)
    labels = torch.arange(20) % 5
    optimizer = torch.optim.Adam(model.parameters(), 2e-2)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert len(freeze(model)[0].weight.detach()[0].unique()) <= 4


def test_bit_operations_are_counted(images):
    shape = (3, 9, 7)
    model = network()
    macs = [8 * 27 * 7 * 5, 8 * 3 * 9 * 7 * 5, 30]
    assert bit_operations(model, shape) == sum(macs) * 32 * 32
    quantized, report = quantize(
        model, images, weights={"0": 4, "7": 2}, activations={"0": 8}, input_shape=shape
    )
    wanted = macs[0] * 4 * 8 + macs[1] * 32 * 32 + macs[2] * 2 * 32
    assert bit_operations(quantized, shape) == wanted
    assert f"{wanted:,} after" in report.table()
    assert list(quantized_layers(quantized)) == ["0", "7"]


def test_an_attention_layer_keeps_an_input_that_it_never_sees():
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 3)).eval()
    x = torch.randn(4, 5, 8)
    with torch.no_grad():
        quantized, report = quantize(model, x)
        assert (quantized(x) - model(x)).abs().max() < 0.1
    assert "0.self_attn.out_proj" in report.notes[1]


def test_a_resnet_in_eight_bits_answers_as_before(images):
    model = create_model("resnet_test", num_classes=5)
    x = torch.randn(8, 3, 33, 40, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for _ in range(3):
            model.train()(x)
        quantized, report = quantize(model, x, input_shape=(3, 33, 40))
        expected = model.eval()(x)
        assert (quantized(x) - expected).norm() < 0.1 * expected.norm()
    assert report.before.bytes > 3 * report.after.bytes


def test_the_harness_compares(images):
    ways = {"8": (8, 8), "2": (Scheme(Integer(2), per="channel"), None)}
    wanted = network()(images)
    rows = bench(network(), images, lambda m: -(m(images) - wanted).square().mean().item(), ways)
    assert [row.name for row in rows] == ["float32", "8", "2"]
    assert rows[0].score == 0 > rows[1].score > rows[2].score
    assert rows[0].bytes > rows[1].bytes > rows[2].bytes
    assert rows[0].bit_operations == 16 * rows[1].bit_operations == 16 * rows[2].bit_operations


def test_what_is_wrong_is_said(images):
    with pytest.raises(ValueError, match="static ranges of activations need images"):
        quantize(network())
    with pytest.raises(ValueError, match="weights: '8' is no convolution or linear layer"):
        quantize(network(), images, weights={"8": 4})
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="remove its parametrization first"):
        quantize(model, activations=None)
