"""The Haar transform against its matrix and its filters."""

import numpy as np
import pytest
import torch

from omniconv.ops.haar import haar_dwt2d, haar_idwt2d


@pytest.fixture
def maps():
    return torch.randn(2, 3, 6, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_bands_are_filters_along_rows_and_columns(maps):
    low, high = np.array([1, 1]) / 2**0.5, np.array([1, -1]) / 2**0.5
    a, details = haar_dwt2d(maps)
    blocks = maps.numpy().reshape(2, 3, 3, 2, 5, 2)
    for band, vertical, horizontal in (
        (a, low, low),
        (details[:, :, 0], high, low),
        (details[:, :, 1], low, high),
        (details[:, :, 2], high, high),
    ):
        np.testing.assert_allclose(
            band, np.einsum("nciajb,a,b->ncij", blocks, vertical, horizontal), atol=1e-14
        )


def test_it_is_orthogonal_and_undone(maps):
    low, high = haar_dwt2d(maps)
    torch.testing.assert_close(low.square().sum() + high.square().sum(), maps.square().sum())
    torch.testing.assert_close(haar_idwt2d(low, high), maps)
    x = maps.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: haar_dwt2d(x), x, fast_mode=True)


def test_odd_sizes_get_a_zero_at_the_end(maps):
    odd = maps[:, :, :5, :9]
    padded = maps.clone()
    padded[:, :, 5:], padded[:, :, :, 9:] = 0, 0
    for found, wanted in zip(haar_dwt2d(odd), haar_dwt2d(padded), strict=True):
        assert torch.equal(found, wanted)
    torch.testing.assert_close(haar_idwt2d(*haar_dwt2d(odd))[:, :, :5, :9], odd)


def test_a_constant_has_no_details():
    low, high = haar_dwt2d(torch.full((4, 6), 3.0))
    assert (low == 6).all()
    assert (high == 0).all()
    assert high.shape == (3, 2, 3)
