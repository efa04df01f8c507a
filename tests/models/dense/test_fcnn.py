"""The hosts of squeeze and excitation."""

import pytest
import torch

from omniconv.layers.attention.scse import insert_gates
from omniconv.models.dense.fcnn import FCNN


@pytest.mark.parametrize("kind", ["unet", "sdnet", "dense"])
def test_every_pixel_of_an_odd_image_gets_scores_and_every_parameter_a_gradient(kind):
    model = FCNN(kind, classes=3, width=4, levels=2, kernel_size=3)
    model = insert_gates(model, torch.zeros(1, 1, 8, 8), model.blocks)
    scores = model(torch.randn(2, 1, 13, 10))
    assert scores.shape == (2, 3, 13, 10)
    scores.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_an_image_changes_the_scores_within_the_receptive_field_alone():
    model = FCNN("unet", width=4, levels=1, kernel_size=3).eval()
    x = torch.randn(1, 1, 48, 48)
    y = x.clone()
    y[..., 0, 0] += 1
    changed = (model(x) != model(y)).any(1)[0].nonzero()
    # Two convolutions in and out, and two at half the resolution.
    assert 0 < changed.max() <= 2 + 2 * 2 + 1 + 2


def test_unpooling_puts_values_where_the_maxima_were():
    model = FCNN("sdnet", width=2, levels=1, kernel_size=1)
    seen = []
    model.decoders[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(torch.randn(2, 1, 6, 4))
    grown, skip = seen[0].split(2, 1)
    for row in range(0, 6, 2):
        for column in range(0, 4, 2):
            window = (..., slice(row, row + 2), slice(column, column + 2))
            place = skip[window].flatten(2).argmax(2, keepdim=True)
            elsewhere = grown[window].flatten(2).scatter(2, place, 0.0)
            assert not elsewhere.any()


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="kind must be one of unet, sdnet, dense: got 'net'"):
        FCNN("net")  # type: ignore[arg-type]
