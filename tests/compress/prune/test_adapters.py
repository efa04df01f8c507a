"""Adapters against their formula, the parameters they leave to be learned, and what fusing them gives."""

import pytest
import torch
from torch import nn

from omniconv.compress.prune.adapters import (
    adapted_parameters,
    add_adapters,
    fuse_adapters,
    prune_channels,
    set_channel_masks,
)
from omniconv.models.factory import create_model


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.Flatten(), nn.Linear(72, 4)
    )


def train(model, x):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", ["splora", "sppara"])
def test_training_while_pruning_then_fusing(kind):
    model, x = network(), torch.randn(5, 3, 5, 5)
    adapted = add_adapters(model, kind, rank=2)
    torch.testing.assert_close(adapted(x), model(x))
    frozen = model[2].weight.detach().clone()
    train(adapted, x)
    prune_channels(adapted, 0.5)
    train(adapted, x)
    layer = adapted[2].parametrizations.weight
    torch.testing.assert_close(layer.original, frozen, rtol=0, atol=0)

    adapter = layer[0]
    wanted = frozen.clone()
    for o in range(8):
        for i in range(6):
            change = adapter.adapter[o, i] if kind == "sppara" else sum(
                adapter.rows[o, r] * adapter.columns[r, i] for r in range(2)
            )  # fmt: skip
            wanted[o, i, 1, 1] += change.detach()
        wanted[o] *= float(adapter.outputs[o])
    torch.testing.assert_close(adapted[2].weight, wanted)
    assert int(adapter.outputs.sum()) == 4
    # The smallest rows go, and the classifier keeps all of its classes.
    assert int(adapted[4].parametrizations.weight[0].outputs.sum()) == 4

    fused, report = fuse_adapters(adapted, input_shape=(3, 5, 5))
    torch.testing.assert_close(fused(x), adapted(x), rtol=1e-5, atol=1e-5)
    assert sorted(fused.state_dict()) == sorted(model.state_dict())
    assert all(p.requires_grad for p in fused.parameters())
    assert report.after.nonzero < report.before.nonzero


def test_learned_parameters_are_those_of_the_channels_left():
    adapted = add_adapters(network(), rank=2)
    biases = 6 + 8 + 4
    assert adapted_parameters(adapted) == biases + 2 * ((6 + 3) + (8 + 6) + (4 + 72))
    outputs, inputs = torch.arange(8) < 3, torch.arange(6) < 2
    set_channel_masks(adapted, {"2": (outputs, inputs)})
    assert adapted_parameters(adapted) == biases + 2 * ((6 + 3) + (3 + 2) + (4 + 72))
    assert not adapted[2].weight[:, 2:].any()
    assert not adapted[2].weight[3:].any()


def test_a_residual_network_with_grouped_convolutions():
    model = create_model("resnet_test", num_classes=5, stem_width=8).eval()
    adapted = add_adapters(
        model, rank=1, layers=[n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    )
    prune_channels(adapted, 0.9)
    x = torch.randn(2, 3, 33, 40)
    torch.testing.assert_close(fuse_adapters(adapted)[0](x), adapted(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: add_adapters(network(), "lora"), "kind must be splora or sppara: got 'lora'"),
        (lambda: add_adapters(network(), rank=0), "rank must be positive: got 0"),
        (
            lambda: add_adapters(nn.ConvTranspose2d(2, 2, 3)),
            "is a transposed convolution, which has no adapter",
        ),
        (lambda: prune_channels(network(), 0.5), "the model has no adapters; call add_adapters first"),
        (lambda: prune_channels(add_adapters(network()), 1.0), r"sparsity must lie in \[0, 1\): got 1.0"),
        (
            lambda: set_channel_masks(add_adapters(network()), {"2": (torch.ones(8), torch.ones(5))}),
            r"2: masks must have shape \(6,\): got \(5,\)",
        ),
    ],
)
def test_messages(call, message):
    with pytest.raises(ValueError, match=message):
        call()
