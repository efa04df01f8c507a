import copy
import pickle

import pytest
import torch
from torch import nn

import omniconv
from omniconv.layers.conv.depthwise import DepthwiseConv1d, DepthwiseConv2d
from omniconv.ops import depthwise_conv, explain


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(8, 8, 31, padding=15, groups=8),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 16, 3, 2, 1, groups=8, padding_mode="reflect", bias=False),
        nn.Conv2d(16, 16, 3, groups=4),
    )


def test_the_layer_is_torchs_with_the_same_state():
    layer, plain = DepthwiseConv2d(6, 5, multiplier=2, padding=2), nn.Conv2d(6, 12, 5, padding=2, groups=6)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 6, 9, 7)
    assert isinstance(layer, nn.Conv2d)
    assert (layer.in_channels, layer.out_channels, layer.groups) == (6, 12, 6)
    torch.testing.assert_close(layer(x), plain(x))
    torch.testing.assert_close(layer(x[0]), plain(x[0]))
    sequence = DepthwiseConv1d(4, 3, padding="same")
    torch.testing.assert_close(sequence(torch.ones(4, 9)), sequence(torch.ones(1, 4, 9))[0])


def test_accelerated_networks_compute_the_same_with_the_same_keys():
    plain, fast = network(), omniconv.accelerate(network())
    assert [type(m).__name__ for m in fast] == [
        "Conv2d", "DepthwiseConv2d", "BatchNorm2d", "DepthwiseConv2d", "Conv2d"
    ]  # fmt: skip
    fast.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(2, 3, 40, 37)
    # Otherwise torch would be compared with itself.
    assert explain(depthwise_conv, torch.empty(2, 8, 40, 37), fast[1].weight, padding=15).chosen == "direct"
    one, other = plain(x), fast(x)
    torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
    one.square().mean().backward()
    other.square().mean().backward()
    for (name, p), (same, q) in zip(plain.named_parameters(), fast.named_parameters(), strict=True):
        assert name == same
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-5)


def test_it_is_taken_back():
    model = network()
    before = [type(m) for m in model.modules()]
    weights = [p.data_ptr() for p in model.parameters()]
    assert omniconv.decelerate(omniconv.accelerate(model)) is model
    assert [type(m) for m in model.modules()] == before
    assert [p.data_ptr() for p in model.parameters()] == weights


def test_hooks_copies_and_pickles_go_on():
    model = omniconv.accelerate(network()).eval()
    seen = []
    model[1].register_forward_hook(lambda *_: seen.append(1))
    x = torch.randn(1, 3, 9, 9)
    y = model(x)
    assert seen == [1]
    torch.testing.assert_close(copy.deepcopy(model)(x), y)
    model[1]._forward_hooks.clear()
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), y)


def test_layers_that_may_compute_something_else_are_left_alone():
    class Standardised(nn.Conv2d):
        def forward(self, input):
            return self._conv_forward(input, self.weight - self.weight.mean(), self.bias)

    model = nn.Sequential(Standardised(4, 4, 3, groups=4), nn.Conv2d(1, 1, 3), nn.Conv2d(4, 4, 3))
    omniconv.accelerate(model)
    assert [type(m) for m in model] == [Standardised, nn.Conv2d, nn.Conv2d]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_low_precision_as_torch_does(dtype):
    plain, fast = network(), omniconv.accelerate(network())
    x = torch.randn(2, 3, 40, 37)
    with torch.autocast("cpu", dtype):
        assert (
            explain(depthwise_conv, torch.empty(2, 8, 40, 37), fast[1].weight, padding=15).chosen == "direct"
        )
        one, other = plain(x), fast(x)
    assert other.dtype == one.dtype == dtype
    torch.testing.assert_close(other, one, rtol=0.05, atol=0.05)
    other.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in fast.parameters())


def test_public_networks_of_the_library_can_be_accelerated():
    torch.manual_seed(0)
    model = omniconv.create_model("convnext_test").eval()
    x = torch.randn(1, 3, 64, 96)
    wanted = model(x)
    keys = list(model.state_dict())
    assert list(omniconv.accelerate(model).state_dict()) == keys
    assert any(isinstance(m, DepthwiseConv2d) for m in model.modules())
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
