"""Convolution of arrays against loops over all pairs of keys."""

import itertools

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

from omniconv.ops.algebra.arrays import Array, convolve
from omniconv.ops.algebra.languages import regular_expressions
from omniconv.ops.algebra.maps import NATURALS, Finite, power
from omniconv.ops.algebra.semirings import BOOLEAN, COUNTING, MAX_PLUS, MIN_PLUS, PROBABILITY, REAL


def draw(shape, semiring):
    whole = torch.randint(0, 6, shape)
    return {BOOLEAN: whole > 3, COUNTING: whole}.get(semiring, whole.double())


@pytest.mark.parametrize("semiring", [BOOLEAN, COUNTING, REAL, PROBABILITY, MIN_PLUS, MAX_PLUS], ids=repr)
@pytest.mark.parametrize("shapes", [((7,), (3,)), ((3,), (8,)), ((4, 5), (3, 2)), ((2, 3, 4), (2, 1, 3))])
def test_equals_the_product_of_dictionaries(semiring, shapes):
    torch.manual_seed(0)
    arrays = [draw(shape, semiring) for shape in shapes]
    got = Array(semiring, arrays[0]) * Array(semiring, arrays[1])
    finites = [
        Finite(
            semiring,
            power(NATURALS, a.ndim),
            {key: a[key].item() for key in itertools.product(*map(range, a.shape))},
        )
        for a in arrays
    ]
    expected = finites[0] * finites[1]
    for key in itertools.product(*map(range, got.values.shape)):
        assert got[key].item() == expected[key], key


def test_real_arrays_are_torchs_convolution_of_the_flipped_kernel():
    image, kernel = torch.randn(9, 7), torch.randn(3, 4)
    expected = F.conv2d(image[None, None], kernel.flip(0, 1)[None, None], padding=(2, 3))[0, 0]
    torch.testing.assert_close(convolve(image, kernel), expected)
    p, q = torch.randn(6), torch.randn(4)
    np.testing.assert_allclose(convolve(p, q).numpy(), np.polymul(p, q), rtol=1e-5, atol=1e-5)


def test_sums_of_unequal_boxes_and_keys_outside():
    total = Array(MIN_PLUS, torch.tensor([3.0, 1.0])) + Array(MIN_PLUS, torch.tensor([2.0, 5.0, 4.0]))
    assert [total[i].item() for i in range(-1, 4)] == [torch.inf, 2, 1, 4, torch.inf]


def test_gradients_pass_through_the_tropical_convolution():
    a, b = (torch.randn(n, dtype=torch.float64, requires_grad=True) for n in (9, 4))
    assert gradcheck(lambda a, b: convolve(a, b, MAX_PLUS), (a, b))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="a and b must have the same one or more axes: got 1 and 2"):
        convolve(torch.zeros(3), torch.zeros(3, 3))
    with pytest.raises(ValueError, match="values of regular expressions over boolean cannot be elements"):
        convolve(torch.zeros(3), torch.zeros(3), regular_expressions(BOOLEAN))
