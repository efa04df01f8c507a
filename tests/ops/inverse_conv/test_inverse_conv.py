"""The inverse of a corner convolution against triangular solves, loops and torch's convolution."""

import pytest
import torch
from torch.nn import functional as F

from omniconv.ops.inverse_conv._torch import _skewed, _straightened
from omniconv.ops.inverse_conv.api import corner_conv, inverse_conv
from omniconv.ops.inverse_conv.reference import corner_matrix

IMPLS = pytest.mark.parametrize("impl", ["torch", "compiled"])


def _draw(channels, kh, kw, height=6, width=5, n=2):
    torch.manual_seed(channels)
    weight = 0.3 * torch.randn(channels, channels, kh, kw, dtype=torch.float64)
    return torch.randn(n, channels, height, width, dtype=torch.float64), weight


def _loop(y, weight):
    """Forward substitution, number by number."""
    x = torch.zeros_like(y)
    n, channels, height, width = y.shape
    kh, kw = weight.shape[2:]
    for s in range(n):
        for i in range(height):
            for j in range(width):
                for o in range(channels):
                    value = y[s, o, i, j].item()
                    for a in range(min(kh, i + 1)):
                        for b in range(min(kw, j + 1)):
                            for c in range(channels if a or b else o):
                                value -= weight[o, c, kh - 1 - a, kw - 1 - b] * x[s, c, i - a, j - b]
                    x[s, o, i, j] = value
    return x


@IMPLS
@pytest.mark.parametrize(("channels", "kh", "kw"), [(1, 3, 3), (2, 1, 1), (3, 2, 4), (2, 5, 1), (1, 7, 2)])
def test_equals_forward_substitution(channels, kh, kw, impl):
    y, weight = _draw(channels, kh, kw, 4, 3)
    torch.testing.assert_close(inverse_conv(y, weight, impl=impl), _loop(y, weight), rtol=1e-11, atol=1e-11)


@IMPLS
@pytest.mark.parametrize(("channels", "kh", "kw"), [(1, 3, 3), (4, 2, 3), (5, 1, 1), (2, 9, 9)])
def test_undoes_torchs_convolution(channels, kh, kw, impl):
    x, weight = _draw(channels, kh, kw)
    full = weight.clone()
    full[:, :, -1, -1] = weight[:, :, -1, -1].tril(-1) + torch.eye(channels)
    y = F.conv2d(F.pad(x, (kw - 1, 0, kh - 1, 0)), full)
    torch.testing.assert_close(corner_conv(x, weight), y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(inverse_conv(y, weight, impl=impl), x, rtol=1e-9, atol=1e-9)


def test_the_matrix_is_unit_lower_triangular_and_the_convolution():
    x, weight = _draw(3, 3, 2)
    matrix = corner_matrix(weight, 6, 5)
    assert torch.equal(matrix.triu(), torch.eye(90, dtype=torch.float64))
    wanted = corner_conv(x, weight).permute(0, 2, 3, 1).flatten(1)
    torch.testing.assert_close(x.permute(0, 2, 3, 1).flatten(1) @ matrix.T, wanted)


@IMPLS
def test_what_is_masked_is_neither_read_nor_given_a_gradient(impl):
    y, weight = _draw(3, 2, 2)
    other = weight.clone()
    other[:, :, -1, -1] += torch.ones(3, 3).triu()
    weight.requires_grad_()
    x = inverse_conv(y, weight, impl=impl)
    assert torch.equal(x, inverse_conv(y, other, impl=impl))
    (gradient,) = torch.autograd.grad((x * x).sum(), weight)
    assert torch.equal(gradient[:, :, -1, -1].triu(), torch.zeros(3, 3))
    assert (gradient[:, :, -1, -1].tril(-1) != 0).sum() == 3


@IMPLS
def test_gradients_are_those_through_a_dense_triangular_solve(impl):
    y, weight = (t.requires_grad_() for t in _draw(2, 3, 3))
    probe = torch.randn(y.shape, dtype=torch.float64)

    def dense(y, weight):
        right = y.permute(0, 2, 3, 1).flatten(1)
        x = torch.linalg.solve_triangular(corner_matrix(weight, 6, 5), right.T, upper=False)
        return x.T.reshape(2, 6, 5, 2).permute(0, 3, 1, 2)

    wanted = torch.autograd.grad((dense(y, weight) * probe).sum(), (y, weight))
    found = torch.autograd.grad((inverse_conv(y, weight, impl=impl) * probe).sum(), (y, weight))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@IMPLS
def test_first_pixels_do_not_depend_on_later_ones(impl):
    y, weight = _draw(2, 3, 3)
    x = inverse_conv(y, weight, impl=impl)
    changed = y.clone()
    changed[:, :, 3, 2] += 1
    moved = (inverse_conv(changed, weight, impl=impl) != x).any(0).any(0)
    assert not moved[:3].any()
    assert not moved[:, :2].any()
    assert moved[3:, 2:].all()


def test_skewing_puts_anti_diagonals_into_columns():
    x = torch.arange(24.0).reshape(1, 2, 3, 4)
    skewed = _skewed(x)
    for d in range(6):
        for i in range(3):
            inside = 0 <= d - i < 4
            assert torch.equal(skewed[0, :, i, d], x[0, :, i, d - i] if inside else torch.zeros(2))
    assert torch.equal(_straightened(skewed, 4), x)


def test_types_must_agree():
    with pytest.raises(ValueError, match=r"must be of one type: got torch\.float32 and torch\.float64"):
        inverse_conv(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2, dtype=torch.float64))
