import numpy as np
import pytest
import torch
from torch.nn import functional as F

from omniconv.inspect.cam.eigen_cam import eigen_cam, principal_map
from omniconv.models.factory import create_model


def svd_map(activation, components=1, centre=False):
    """The definition, one sample at a time."""
    maps = []
    for one in activation.double():
        o = one.flatten(1).T
        if centre:
            o = o - o.mean(0)
        _, _, vt = torch.linalg.svd(o, full_matrices=False)
        total = 0
        for v in vt[:components]:
            p = o @ v
            total = total + (p if p.clamp(min=0).norm() >= p.clamp(max=0).norm() else -p).clamp(min=0)
        maps.append(total.reshape(one.shape[1:]))
    return torch.stack(maps)


@pytest.mark.parametrize("shape", [(3, 24, 9, 7), (2, 96, 5, 6), (1, 17, 13, 11), (2, 1, 4, 3), (2, 7, 1, 1)])
@pytest.mark.parametrize("centre", [False, True])
def test_equals_the_singular_value_decomposition(shape, centre):
    torch.manual_seed(0)
    activation = torch.randn(shape).relu()
    expected = svd_map(activation, centre=centre)
    found = principal_map(activation, centre=centre)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * float(activation.max()))


def test_several_components_add_up():
    torch.manual_seed(1)
    activation = torch.randn(2, 12, 6, 5)
    torch.testing.assert_close(principal_map(activation, 3), svd_map(activation, 3), rtol=1e-5, atol=1e-6)


def test_is_the_best_approximation_of_rank_one():
    torch.manual_seed(2)
    activation = torch.rand(1, 9, 8, 7)
    o = activation[0].flatten(1).T.double()
    projection = principal_map(activation).reshape(-1, 1)  # positive activations: nothing is rectified away
    best = (o - projection @ (projection.T @ o) / (projection.T @ projection)).norm()
    s = torch.linalg.svdvals(o)
    torch.testing.assert_close(best, s[1:].norm())  # Eckart and Young
    for _ in range(20):
        v = F.normalize(torch.randn(9, 1, dtype=torch.double), dim=0)
        assert (o - o @ v @ v.T).norm() >= best


def test_the_library_variant_is_the_centred_one():
    # pytorch-grad-cam's EigenCAM: positions by channels, less the mean over positions, times the first right
    # singular vector, rectified, scaled to [0, 1]; its sign is left to chance.
    torch.manual_seed(3)
    activation = torch.randn(4, 8, 6, 6).relu()
    ours = principal_map(activation, centre=True).numpy()
    for one, map_ in zip(activation.numpy(), ours, strict=True):
        matrix = one.reshape(len(one), -1).transpose()
        matrix = matrix - matrix.mean(axis=0)
        _, _, vt = np.linalg.svd(matrix, full_matrices=True)
        projection = (matrix @ vt[0]).reshape(6, 6)
        options = [np.maximum(projection, 0), np.maximum(-projection, 0)]
        assert min(np.abs(option - map_).max() for option in options) < 1e-5


def test_a_planted_pattern_comes_back():
    random = torch.Generator().manual_seed(0)
    where = torch.rand(1, 1, 9, 11, generator=random)
    what = torch.randn(1, 20, 1, 1, generator=random)  # of both signs
    found = principal_map(where * what + 0.01 * torch.randn(1, 20, 9, 11, generator=random))
    assert np.corrcoef(found.flatten(), where.flatten())[0, 1] > 0.999


def test_the_bright_minority_is_positive_when_centred():
    activation = torch.zeros(1, 4, 8, 8)
    activation[..., 2:4, 5:7] = 1.0
    expected = activation[0, 0] > 0
    assert torch.equal(principal_map(activation, centre=True)[0] > 0, expected)


def test_nothing_there_gives_an_empty_map():
    assert (principal_map(torch.zeros(2, 3, 4, 5)) == 0).all()


def test_components_must_fit():
    with pytest.raises(ValueError, match=r"components must lie in \[1, 3\] for this layer: got 4"):
        principal_map(torch.zeros(1, 3, 4, 5), components=4)


def test_does_not_depend_on_the_classifier():
    torch.manual_seed(0)
    model = create_model("resnet_test", num_classes=5)
    x = torch.randn(2, 3, 33, 47)
    first = eigen_cam(model, x).data["map"]
    with torch.no_grad():
        model.get_classifier().weight.normal_()
    np.testing.assert_array_equal(eigen_cam(model, x).data["map"], first)
    assert first.shape == (2, 33, 47)
    np.testing.assert_allclose(eigen_cam(model, x[1:]).data["map"][0], first[1], atol=1e-4)
