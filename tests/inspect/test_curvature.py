"""Curvatures against whole Hessians, slices against the loss itself."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from omniconv.inspect.curvature import Loss, filter_direction, hessian_eigenvalues, loss_landscape


def loss_on(batch: tuple[Tensor, Tensor]) -> Loss:
    return lambda model: F.mse_loss(model(batch[0]), batch[1])


def small() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double().train()
    return model, [(torch.randn(8, 4).double(), torch.randn(8, 2).double()) for _ in range(2)]


def test_eigenvalues_are_those_of_the_whole_hessian():
    model, batches = small()
    names, values = zip(*((n, p.detach()) for n, p in model.named_parameters()), strict=True)
    spectrum = hessian_eigenvalues(
        model, map(loss_on, batches), count=2, weight_decay=0.1, iterations=500, tolerance=1e-9
    )
    for batch, found in zip(batches, spectrum.data["eigenvalue"], strict=True):

        def function(flat: Tensor, batch=batch) -> Tensor:
            parts = flat.split([v.numel() for v in values])
            weights = {n: part.view_as(v) for n, part, v in zip(names, parts, values, strict=True)}
            return (
                F.mse_loss(functional_call(model, weights, (batch[0],)), batch[1])
                + 0.05 * flat.square().sum()
            )

        flat = torch.cat([v.flatten() for v in values])
        whole = torch.linalg.eigvalsh(torch.autograd.functional.hessian(function, flat))
        expected = whole[whole.abs().argsort(descending=True)[:2]].numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-3)
    assert model.training
    assert spectrum.plot().axes


def test_slices_go_through_the_weights():
    model, batches = small()
    before = [p.clone() for p in model.parameters()]
    for directions in (1, 2):
        found = loss_landscape(model, loss_on(batches[0]), directions=directions, steps=3, span=0.5)
        assert found.data["loss"].shape == (3,) * directions
        centre = found.data["loss"][(1,) * directions]
        np.testing.assert_allclose(centre, loss_on(batches[0])(model).item())
        assert found.plot().axes
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_directions_have_the_filters_lengths():
    model, _ = small()
    direction = filter_direction(model, 3)
    weight = model.get_submodule("0").get_parameter("weight")
    torch.testing.assert_close(direction["0.weight"].norm(dim=1), weight.detach().norm(dim=1))
    assert not direction["0.bias"].any()
