"""Grad-CAM, Grad-CAM++ and LayerCAM against closed forms and finite differences."""

import numpy as np
import pytest
import torch
from torch import nn

from omniconv.core.errors import UsageError
from omniconv.inspect.cam.grad_cam import grad_cam
from omniconv.inspect.cam.grad_cam_pp import grad_cam_pp
from omniconv.inspect.cam.layer_cam import layer_cam
from omniconv.models.factory import create_model

METHODS = [grad_cam, grad_cam_pp, layer_cam]


class Cam(nn.Module):
    """Global average pooling and a linear classifier, for which CAM has a closed form."""

    def __init__(self, positive=False):
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        return self.fc(self.act(self.conv(x)).mean((2, 3)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Cam()


@pytest.fixture
def x():
    return torch.randn(3, 2, 9, 7, generator=torch.Generator().manual_seed(1))


def unit(maps):
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return ((maps - low) / (high - low)).detach().numpy()


def test_with_average_pooling_grad_cam_is_cam(model, x):
    classes = torch.tensor([2, 0, 3])
    features = model.act(model.conv(x))
    cam = torch.einsum("nc,nchw->nhw", model.fc.weight[classes], features).relu()
    found = grad_cam(model, x, classes, "act")
    np.testing.assert_allclose(found.data["map"], unit(cam), atol=1e-5)
    assert found.data["target"].tolist() == [2, 0, 3]


def test_with_average_pooling_layer_cam_uses_the_positive_weights(model, x):
    features = model.act(model.conv(x))
    cam = torch.einsum("c,nchw->nhw", model.fc.weight[1].relu(), features)
    np.testing.assert_allclose(layer_cam(model, x, 1, model.act).data["map"], unit(cam), atol=1e-5)


def test_grad_cam_pp_equals_its_definition_through_derivatives_of_exp(model, x):
    # Y = exp(y); the paper's alpha from the second and third derivatives of Y by each activation.
    model, x = model.double(), x.double()
    features = model.act(model.conv(x)).detach()
    expected = []
    for a in features:
        w = torch.zeros(6, dtype=torch.double)
        for c in range(6):
            for i in range(a.shape[1]):
                for j in range(a.shape[2]):

                    def score(value, c=c, i=i, j=j, a=a):
                        changed = a.clone().index_put(
                            (torch.tensor(c), torch.tensor(i), torch.tensor(j)), value
                        )
                        return model.fc(changed.mean((1, 2)))[1].exp()

                    point = a[c, i, j].clone().requires_grad_()
                    (first,) = torch.autograd.grad(score(point), point, create_graph=True)
                    (second,) = torch.autograd.grad(first, point, create_graph=True)
                    (third,) = torch.autograd.grad(second, point)
                    alpha = second / (2 * second + a[c].sum() * third)
                    w[c] += (alpha * first.relu()).detach()
        expected.append(torch.einsum("c,chw->hw", w, a).relu())
    found = grad_cam_pp(model, x, 1, "act").data["map"]
    np.testing.assert_allclose(found, unit(torch.stack(expected)), atol=1e-5)


def test_gradients_equal_finite_differences_through_a_deep_network():
    torch.manual_seed(3)
    network = create_model("resnet_test", num_classes=4).double().eval()
    x = torch.randn(1, 3, 17, 21, dtype=torch.double)
    features = network.forward_stages(x)[2]
    step = 1e-5

    def rest(value):
        return network.forward_head(network.get_submodule("layer3")(value))[0, 2]

    slopes = torch.zeros_like(features)
    with torch.no_grad():
        for index in np.ndindex(*features.shape):
            up, down = features.clone(), features.clone()
            up[index] += step
            down[index] -= step
            slopes[index] = (rest(up) - rest(down)) / (2 * step)
    expected = (slopes.mean((2, 3), keepdim=True) * features).sum(1).relu()
    expected = torch.nn.functional.interpolate(expected[:, None], size=(17, 21), mode="bilinear")[:, 0]
    np.testing.assert_allclose(grad_cam(network, x, 2, "layer2").data["map"], unit(expected), atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_the_class_matters_and_the_default_is_the_first(method, model, x):
    with torch.no_grad():
        classes = model(x).argmax(1)
    default = method(model, x, layer="act").data
    np.testing.assert_array_equal(default["target"], classes)
    np.testing.assert_array_equal(default["map"], method(model, x, classes.tolist(), "act").data["map"])
    others = [method(model, x, k, "act").data["map"] for k in range(4)]
    assert max(np.abs(other - others[0]).max() for other in others) > 0.1


@pytest.mark.parametrize("method", METHODS)
def test_a_function_as_target(method, model, x):
    by_class = method(model, x, 2, "act").data["map"]
    by_function = method(model, x, lambda output: output[:, 2], "act").data
    np.testing.assert_array_equal(by_function["map"], by_class)
    assert "target" not in by_function


@pytest.mark.parametrize("method", METHODS)
def test_several_layers_of_one_path(method):
    torch.manual_seed(4)
    model = create_model("resnet_test", num_classes=4)
    x = torch.randn(2, 3, 32, 32)
    one, two = (method(model, x, 1, layer).data["map"] for layer in ("layer2", "layer3"))
    mean = (one + two) / 2
    low, high = mean.min((1, 2), keepdims=True), mean.max((1, 2), keepdims=True)
    both = method(model, x, 1, ["layer2", "layer3"]).data["map"]
    np.testing.assert_allclose(both, (mean - low) / (high - low), atol=1e-4)


def test_wrong_targets_are_named(model, x):
    with pytest.raises(ValueError, match=r"target must lie in \[0, 4\): got \[4, 4, 4\]"):
        grad_cam(model, x, 4, "act")
    with pytest.raises(ValueError, match=r"one score a sample: got shape \(\)"):
        grad_cam(model, x, lambda output: output.sum(), "act")
    with pytest.raises(UsageError, match="the score does not depend on the layer"):
        grad_cam(model, x, lambda output: torch.ones(3), "act")
    with pytest.raises(UsageError, match=r"output is not \(N, classes\)"):
        grad_cam(nn.Sequential(nn.Conv2d(2, 2, 3)), x, None, "0")
