"""What every activation map promises about the model that it watches."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from omniconv.core.errors import DataError, UsageError
from omniconv.inspect.cam.eigen_cam import eigen_cam
from omniconv.inspect.cam.grad_cam import grad_cam
from omniconv.inspect.cam.grad_cam_pp import grad_cam_pp
from omniconv.inspect.cam.layer_cam import layer_cam
from omniconv.models.factory import create_model

METHODS = [eigen_cam, grad_cam, grad_cam_pp, layer_cam]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return create_model("resnet_test", num_classes=4, in_chans=2)


@pytest.fixture
def x():
    return torch.randn(3, 2, 31, 45, generator=torch.Generator().manual_seed(0))


def hooks(model):
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()
    )


@pytest.mark.parametrize("method", METHODS)
def test_the_model_comes_back_untouched(method, model, x):
    model.train()
    model.get_submodule("layer1").eval()  # a part frozen by its owner
    model(x).sum().backward()
    state = copy.deepcopy(model.state_dict())
    slopes = [p.grad.clone() for p in model.parameters()]
    flags = [m.training for m in model.modules()]
    before, random = x.clone(), torch.get_rng_state()
    method(model, x)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert all(torch.equal(a, p.grad) for a, p in zip(slopes, model.parameters(), strict=True))
    assert flags == [m.training for m in model.modules()]
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(x, before)
    assert x.grad is None
    assert torch.equal(random, torch.get_rng_state())
    assert hooks(model) == 0
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("method", METHODS)
def test_hooks_and_mode_come_back_after_an_error(method, model):
    model.train()
    with pytest.raises(RuntimeError):
        method(model, torch.randn(1, 5, 32, 32))  # five channels into a network for two
    assert hooks(model) == 0
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("method", METHODS)
def test_maps_have_the_inputs_size_and_lie_between_0_and_1(method, model, x):
    data = method(model, x).data
    assert data["map"].shape == (3, 31, 45)
    assert data["map"].dtype == np.float32
    assert data["map"].min() >= 0
    assert data["map"].max() <= 1
    np.testing.assert_array_equal(data["input"], x.numpy())


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_its_samples(method, model, x):
    whole = method(model, x).data["map"]
    for index in range(3):
        np.testing.assert_allclose(
            method(model, x[index : index + 1]).data["map"][0], whole[index], atol=1e-4
        )


@pytest.mark.parametrize("method", METHODS)
def test_under_no_grad_inference_mode_and_with_frozen_parameters(method, model, x):
    expected = method(model, x).data["map"]
    with torch.no_grad():
        np.testing.assert_allclose(method(model, x).data["map"], expected, atol=1e-5)
    with torch.inference_mode():
        np.testing.assert_allclose(method(model, x + 0).data["map"], expected, atol=1e-5)
    model.requires_grad_(False)
    np.testing.assert_allclose(method(model, x).data["map"], expected, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_is_a_module_or_its_name_and_may_be_followed_by_work_in_place(method, model, x):
    for name in ("bn1", "layer2.0.conv1", "layer2.1", "maxpool"):
        by_name = method(model, x, layer=name).data["map"]
        np.testing.assert_array_equal(method(model, x, layer=model.get_submodule(name)).data["map"], by_name)
    last = model.feature_info[-1]["module"]
    np.testing.assert_array_equal(method(model, x).data["map"], method(model, x, layer=last).data["map"])


@pytest.mark.parametrize("method", METHODS)
def test_half_precision(method, model, x):
    assert np.isfinite(method(model.bfloat16(), x.bfloat16()).data["map"]).all()


def test_eigen_cam_of_a_network_with_any_output(x):
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Conv2d(2, 3, 3, 2)

        def forward(self, x):
            return {"boxes": [self.body(x).mean((1, 2))], "scores": None}

    assert eigen_cam(Detector(), x, "body").data["map"].shape == (3, 31, 45)


def test_a_feature_extractor_has_a_last_map_too(x):
    extractor = create_model("resnet_test", in_chans=2, features_only=True)
    plain = create_model("resnet_test", in_chans=2)
    assert not plain.load_state_dict(extractor.backbone.state_dict(), strict=False).unexpected_keys
    np.testing.assert_array_equal(eigen_cam(extractor, x).data["map"], eigen_cam(plain, x).data["map"])


def test_errors_name_the_layer(model, x):
    with pytest.raises(UsageError, match=r"ResNet has no layer 'layer_3'; did you mean layer3\?"):
        eigen_cam(model, x, "layer_3")
    with pytest.raises(UsageError, match="Sequential does not say where its feature maps are"):
        eigen_cam(nn.Sequential(nn.Conv2d(2, 2, 3)), x)
    with pytest.raises(UsageError, match=r"layer 'fc' gives no feature map \(N, C, H, W\) but \(3, 4\)"):
        eigen_cam(model, x, "fc")
    with pytest.raises(UsageError, match="the layer Conv2d is not a part of ResNet"):
        eigen_cam(model, x, nn.Conv2d(1, 1, 1))
    with pytest.raises(UsageError, match="no layer was named"):
        eigen_cam(model, x, [])
    with pytest.raises(ValueError, match=r"batch of images \(N, C, H, W\): got shape \(2, 31, 45\)"):
        eigen_cam(model, x[0])
    model.spare = nn.Conv2d(2, 2, 1)
    with pytest.raises(UsageError, match="layer 'spare' takes no part in the forward pass"):
        eigen_cam(model, x, "spare")
    with pytest.raises(DataError, match="layer 'layer3' gives values that are not finite"):
        eigen_cam(model, x * float("nan"))


def test_a_map_without_contrast_is_empty():
    conv = nn.Conv2d(1, 2, 1)
    nn.init.zeros_(conv.weight)
    nn.init.ones_(conv.bias)
    assert (eigen_cam(nn.Sequential(conv), torch.randn(1, 1, 5, 5), "0").data["map"] == 0).all()


@pytest.mark.parametrize("count", [1, 3, 18])
def test_the_drawing_has_one_picture_a_sample_up_to_sixteen(count, model):
    figure = grad_cam(model, torch.randn(count, 2, 32, 32), 1).plot()
    assert sum(len(axis.images) for axis in figure.axes) == min(count, 16)
    assert figure.axes[0].get_title() == "class 1"
