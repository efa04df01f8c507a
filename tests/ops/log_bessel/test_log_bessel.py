"""Logarithms of Bessel functions against mpmath and SciPy."""

import mpmath
import numpy as np
import pytest
import scipy.special
import torch

from omniconv.ops.log_bessel import _compiled
from omniconv.ops.log_bessel.iv import log_iv
from omniconv.ops.log_bessel.kv import log_kv

OPS = {log_iv: mpmath.besseli, log_kv: mpmath.besselk}
# Near every border: v^2 + x^2 = 25^2 and 300^2, x = 2, half orders, the root of the exponent, zeros of the logarithm.
POINTS = [
    (0.0, 1e-8), (0.0, 1.0), (0.0, 1.9999), (0.0, 2.0), (0.0, 24.99), (0.0, 25.0), (0.0, 1e8),
    (0.25, 1.27), (0.49999, 1e-8), (0.5, 0.5), (0.50001, 2.0), (1.0, 1.0), (1.5, 1.99), (2.4999, 0.1),
    (2.5, 1e-4), (24.49, 1e-8), (24.5, 2.0), (24.9, 2.1), (25.0, 1e-8), (17.6, 17.7), (17.7, 17.8),
    (100.0, 66.27), (120.0, 80.0), (212.0, 212.2), (299.0, 20.0), (1000.0, 662.7), (1000.0, 670.0),
    (31622.0, 1e-8), (1e5, 1e-8), (1e5, 1e3),
]  # fmt: skip


@pytest.mark.parametrize("impl", ["torch", "compiled"])
@pytest.mark.parametrize("op", list(OPS))
def test_values_have_thirteen_digits(op, impl):
    v, x = torch.tensor(POINTS, dtype=torch.float64).T
    got = op(v, x, impl=impl)
    with mpmath.workdps(50):
        for (order, argument), value in zip(POINTS, got.tolist(), strict=True):
            wanted = mpmath.log(OPS[op](mpmath.mpf(order), mpmath.mpf(argument)))
            assert abs(value - wanted) <= 1e-13 * max(1, abs(wanted)), (order, argument)


@pytest.mark.parametrize("impl", ["torch", "compiled"])
@pytest.mark.parametrize("op", list(OPS))
def test_derivatives_have_ten_digits(op, impl):
    points = [(0.3, 1e-3), (0.3, 3.0), (7.2, 0.5), (7.2, 11.0), (20.0, 40.0), (70.0, 46.5), (400.0, 20.0)]
    v, x = (t.clone().requires_grad_() for t in torch.tensor(points, dtype=torch.float64).T)
    by_v, by_x = torch.autograd.grad(op(v, x, impl=impl).sum(), [v, x])
    with mpmath.workdps(50):
        for (order, argument), dv, dx in zip(points, by_v.tolist(), by_x.tolist(), strict=True):
            at = mpmath.mpf(order), mpmath.mpf(argument)
            for got, which in ((dv, (1, 0)), (dx, (0, 1))):
                wanted = mpmath.diff(lambda a, b: mpmath.log(OPS[op](a, b)), at, which)
                assert abs(got - wanted) <= 1e-10 * abs(wanted), (order, argument, which)


@pytest.mark.parametrize("impl", ["torch", "compiled"])
@pytest.mark.parametrize(("op", "scaled"), [(log_iv, scipy.special.ive), (log_kv, scipy.special.kve)])
def test_it_equals_scipy_where_that_is_finite_and_is_finite_elsewhere(op, scaled, impl):
    random = np.random.default_rng(0)
    v, x = 10 ** random.uniform(-3, 5, 4000), 10 ** random.uniform(-8, 8, 4000)
    with np.errstate(all="ignore"):
        wanted = np.log(scaled(v, x)) + (x if op is log_iv else -x)
    finite = np.isfinite(wanted)
    assert 0.5 < finite.mean() < 0.9
    got = op(torch.from_numpy(v), torch.from_numpy(x), impl=impl).numpy()
    np.testing.assert_allclose(got[finite], wanted[finite], rtol=1e-11, atol=1e-11)
    assert np.isfinite(got).all()


@pytest.mark.parametrize("op", list(OPS))
def test_both_implementations_agree_in_all_regions(op):
    random = torch.Generator().manual_seed(0)
    v, x = (10 ** (9 * torch.rand(2, 20000, generator=random, dtype=torch.float64) - 4)).requires_grad_()
    results = []
    for impl in ("torch", "compiled"):
        y = op(v, x, impl=impl)
        results.append([y.detach(), *torch.autograd.grad(y.sum(), [v, x])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("impl", ["torch", "compiled"])
@pytest.mark.parametrize("op", list(OPS))
def test_outside_the_domain_is_nan_and_harms_nothing_inside(op, impl):
    v = torch.tensor([-1.0, 1.0, 1.0, 1.0, float("nan"), 1.0], dtype=torch.float64)
    x = torch.tensor([1.0, 0.0, -2.0, float("inf"), 1.0, 1.0], dtype=torch.float64, requires_grad=True)
    y = op(v, x, impl=impl)
    assert torch.isnan(y).tolist() == [True] * 5 + [False]
    assert torch.isfinite(torch.autograd.grad(y[-1], x)[0][-1])


@pytest.mark.parametrize("op", list(OPS))
def test_numbers_and_whole_orders_are_orders(op):
    x = torch.tensor([0.5, 3.0])
    assert torch.equal(op(2, x), op(torch.tensor(2.0), x))
    assert op(torch.arange(3), x[:1]).dtype == torch.float32
    assert op(torch.tensor([0.1], dtype=torch.float64), x).dtype == torch.float64
    wanted = op(torch.tensor(0.1, dtype=torch.float64), x.double())
    assert torch.equal(op(0.1, x.double()), wanted), "a number keeps its digits"


def test_many_threads_write_what_one_does(monkeypatch):
    monkeypatch.setattr(_compiled, "_LEAST", 100)
    v, x = torch.rand(2, 5000, dtype=torch.float64) * 60
    threads = torch.get_num_threads()
    wanted = log_kv(v, x, impl="torch")
    try:
        torch.set_num_threads(3)
        torch.testing.assert_close(log_kv(v, x, impl="compiled"), wanted, rtol=1e-13, atol=1e-13)
    finally:
        torch.set_num_threads(threads)
