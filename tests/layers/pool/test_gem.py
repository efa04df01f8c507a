"""Generalized-mean pooling against its definition and at both ends of its exponent."""

import pytest
import torch

from omniconv.layers.pool.gem import GeneralizedMeanPool2d


@pytest.mark.parametrize("p", [0.5, 3.0])
def test_it_is_the_generalized_mean_of_the_positive_part(p):
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    expected = torch.empty(2, 3, dtype=torch.float64)
    for n in range(2):
        for c in range(3):
            values = [max(float(v), 1e-6) for v in x[n, c].flatten()]
            expected[n, c] = (sum(v**p for v in values) / len(values)) ** (1 / p)
    torch.testing.assert_close(GeneralizedMeanPool2d(p).double()(x), expected)


def test_it_goes_from_the_average_to_the_maximum():
    x = torch.rand(2, 3, 5, 4, dtype=torch.float64) + 0.1
    torch.testing.assert_close(GeneralizedMeanPool2d(1.0).double()(x), x.mean((2, 3)))
    torch.testing.assert_close(GeneralizedMeanPool2d(2000.0).double()(x), x.amax((2, 3)), rtol=2e-3, atol=0)
