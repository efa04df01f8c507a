import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import omniconv
from omniconv.deploy.folding import find_folds
from omniconv.layers.conv.depthwise import DepthwiseConv2d
from omniconv.ops import depthwise_conv, explain
from omniconv.testing.harness import randomize


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(8, 8, 31, padding=15, groups=8),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 16, 3, 2, 1, groups=8, padding_mode="reflect", bias=False),
        nn.Conv2d(16, 16, 3, groups=4),
    )


def test_accelerated_networks_compute_the_same_with_the_same_keys():
    plain, fast = network(), omniconv.accelerate(network())
    assert [type(m).__name__ for m in fast] == [
        "Conv2d", "DepthwiseConv2d", "BatchNorm2d", "DepthwiseConv2d", "Conv2d"
    ]  # fmt: skip
    fast.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(2, 3, 40, 37)
    # Otherwise torch would be compared with itself.
    assert explain(depthwise_conv, torch.empty(2, 8, 40, 37), fast[1].weight, padding=15).chosen == "fft"
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
    weights = [(p, p.clone(), p.stride()) for p in model.parameters()]
    assert omniconv.decelerate(omniconv.accelerate(model.eval())) is model
    assert [type(m) for m in model.modules()] == before
    assert all("forward" not in m.__dict__ for m in model.modules())
    for now, (then, value, stride) in zip(model.parameters(), weights, strict=True):
        assert now is then
        assert now.stride() == stride
        assert torch.equal(now, value)


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


def test_networks_on_the_meta_device_still_give_shapes():
    model = omniconv.accelerate(network().eval())
    model(torch.randn(1, 3, 40, 37))
    with torch.no_grad():
        assert copy.deepcopy(model).to("meta")(torch.empty(1, 3, 40, 37, device="meta")).shape == (
            1,
            16,
            18,
            17,
        )


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
        assert explain(depthwise_conv, torch.empty(2, 8, 40, 37), fast[1].weight, padding=15).chosen == "fft"
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


def folded(*more):
    """Return a convolution, its norm and whatever follows, in eval mode, the norm far from its initial state."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(6)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        nn.init.uniform_(tensor, 0.5, 1.5)
    return nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1, bias=False), norm, *more).eval()


@pytest.mark.parametrize(
    "act",
    [nn.ReLU(inplace=True), nn.ReLU6(), nn.SiLU(), nn.Hardswish(), nn.GELU(), nn.GELU("tanh"), nn.Tanh()],
)
@torch.no_grad()
def test_inference_runs_convolution_norm_and_activation_as_one(act):
    model = folded(act)
    x = torch.randn(2, 4, 9, 7)
    wanted = model(x)
    torch.testing.assert_close(omniconv.accelerate(model)(x), wanted, rtol=1e-5, atol=1e-6)
    if not isinstance(act, nn.Tanh):
        # The convolution alone gives what the three give: it has done their work.
        torch.testing.assert_close(model[0](x), wanted, rtol=1e-5, atol=1e-6)
    assert not hasattr(model(x), "_done")


@torch.no_grad()
def test_folded_weights_follow_every_change():
    model, twin = omniconv.accelerate(folded(nn.ReLU())), folded(nn.ReLU())
    x = torch.randn(2, 4, 9, 7)
    model(x)
    for tensor in (0, 1):
        for name in model[tensor].state_dict():
            if name != "num_batches_tracked":
                model[tensor].state_dict()[name].mul_(1.5)
                twin[tensor].state_dict()[name].mul_(1.5)
                torch.testing.assert_close(model(x), twin(x), rtol=1e-5, atol=1e-6)
    model.double()
    torch.testing.assert_close(model(x.double()), twin.double()(x.double()))


@torch.no_grad()
def test_weights_that_are_parametrized_later_are_computed_every_time():
    model, x = omniconv.accelerate(folded(nn.ReLU())), torch.randn(2, 4, 9, 7)
    model(x)
    scale = nn.Parameter(torch.ones(()))

    class Scaled(nn.Module):
        def forward(self, weight):
            return weight * scale

    nn.utils.parametrize.register_parametrization(model[0], "weight", Scaled())
    for value in (1.0, 0.5, 2.0):
        scale.fill_(value)
        plain = nn.functional.conv2d(x, model[0].weight, None, 2, 1)
        torch.testing.assert_close(model(x), model[2](model[1](plain)))


def test_training_gradients_hooks_and_other_norms_see_every_layer():
    model, twin = omniconv.accelerate(folded(nn.ReLU())), folded(nn.ReLU())
    x = torch.randn(2, 4, 9, 7)
    torch.testing.assert_close(model(x), twin(x), rtol=0, atol=1e-6)  # with gradients
    seen = []
    handle = model[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        model(x)
        torch.testing.assert_close(seen[0], twin[0](x))
        handle.remove()
        model[1] = nn.BatchNorm2d(6).eval()
        torch.testing.assert_close(model(x), model[2](twin[0](x)) / (1 + 1e-5) ** 0.5, rtol=1e-4, atol=1e-5)
    model.train()
    torch.testing.assert_close(model[0](x), twin[0](x))


@torch.no_grad()
def test_what_others_use_too_is_not_folded():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.act = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()
            self.twice = nn.Conv2d(6, 6, 1)

        def forward(self, x):
            y = self.conv(x)
            z = self.norm(y)
            return self.act(z) + y + self.twice(self.twice(z))

    class Untraceable(nn.Sequential):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    assert find_folds(Branching().eval()) == []
    assert find_folds(Untraceable(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))) == []
    normed = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, track_running_stats=False)).eval()
    assert find_folds(normed) == []


@pytest.mark.parametrize("name", ["resnet_test", "mobilenetv2_test", "efficientnet_test", "unireplknet_test"])
@torch.no_grad()
def test_inference_of_whole_networks_stays_the_same(name):
    torch.manual_seed(0)
    model = randomize(omniconv.create_model(name)).eval()
    x = torch.randn(2, 3, 64, 96)
    wanted, keys = model(x), list(model.state_dict())
    omniconv.accelerate(model)
    assert any("_fold" in m.__dict__ for m in model.modules())
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-4)
    assert list(model.state_dict()) == keys
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(x), model(x))
        assert not {id(m) for m in other.modules()} & {id(m) for m in model.modules()}


def test_the_report_names_layers_and_what_they_save():
    model = omniconv.accelerate(network().eval())
    told = omniconv.acceleration(model, torch.randn(2, 3, 40, 37))
    changed = {change.layer: change for change in told.changes}
    assert changed["1"].what in ("folds 2", "depthwise, fft")
    assert "layers changed" in str(told)
    told = omniconv.acceleration(model.train(), torch.randn(2, 3, 40, 37))
    (one,) = told.changes
    assert (one.layer, one.what) == ("1", "depthwise, fft")
    assert one.before > one.after > 0
    assert told.saved == one.before - one.after


CONVS = st.fixed_dictionaries(
    {
        "groups": st.sampled_from(["dense", "depthwise", "two"]),
        "kernel": st.sampled_from([1, 2, 3, 5, 7, 13]),
        "stride": st.sampled_from([1, 1, 2]),
        "dilation": st.sampled_from([1, 1, 2]),
        "bias": st.booleans(),
        "mode": st.sampled_from(["zeros", "zeros", "circular"]),
        "norm": st.booleans(),
        "act": st.sampled_from([None, nn.ReLU, nn.SiLU, nn.Tanh]),
        "residual": st.booleans(),
    }
)


class Residual(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        y = self.layers(x)
        return x + y if x.shape == y.shape else y


@settings(max_examples=20, deadline=None)
@given(st.lists(CONVS, min_size=1, max_size=4), st.integers(0, 99), st.booleans())
def test_any_network_of_convolutions_computes_the_same(layers, seed, last):
    torch.manual_seed(seed)
    parts = []
    for one in layers:
        groups = {"dense": 1, "depthwise": 8, "two": 2}[one["groups"]]
        pad = one["dilation"] * (one["kernel"] - 1) // 2
        how = {
            "groups": groups,
            "bias": one["bias"],
            "padding_mode": one["mode"],
            "dilation": one["dilation"],
        }
        block = [nn.Conv2d(8, 8, one["kernel"], one["stride"], pad, **how)]
        block += [nn.BatchNorm2d(8)] * one["norm"]
        block += [one["act"]()] if one["act"] else []
        parts.append(Residual(*block) if one["residual"] else nn.Sequential(*block))
    plain = randomize(nn.Sequential(*parts), seed).double()
    x = torch.randn(2, 8, 41, 37, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    for mode in (True, False):
        plain.train(mode)
        fast = omniconv.accelerate(copy.deepcopy(plain))
        single = omniconv.accelerate(copy.deepcopy(plain).float())
        results = []
        for model in (plain, fast):
            y = model(x)
            results.append([y.detach(), *torch.autograd.grad(y.square().sum(), list(model.parameters()))])
        # The gradient of a bias before a batch norm is nothing but rounding.
        scale = max(float(tensor.abs().max()) for tensor in results[0])
        for wanted, got in zip(*results, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11 * scale)
        with torch.no_grad():
            wanted = plain(x)
            torch.testing.assert_close(fast(x), wanted, rtol=1e-9, atol=1e-9 * float(wanted.abs().max()))
            torch.testing.assert_close(
                single(x.float()).double(), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max())
            )


def test_kernels_of_one_pixel_carry_channels_last():
    # Their strides fit both formats, so only weights that say which one keep what follows in it.
    net = omniconv.accelerate(nn.Sequential(nn.Conv2d(6, 8, 1), nn.ReLU()).eval())
    assert net(torch.randn(2, 6, 5, 7)).is_contiguous(memory_format=torch.channels_last)
