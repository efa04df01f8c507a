"""The von Mises-Fisher distribution against closed forms and SciPy."""

import math

import pytest
import scipy.stats
import torch

from omniconv.ops.von_mises_fisher import fit_vmf, sample_vmf, vmf_log_normalizer, vmf_mean_length


def test_on_the_usual_sphere_the_normaliser_is_elementary():
    kappa = torch.tensor([0.01, 1.0, 30.0, 700.0], dtype=torch.float64)
    # kappa / (4 pi sinh kappa), and the mean's length is coth kappa - 1 / kappa.
    sinh = kappa + torch.log1p(-torch.exp(-2 * kappa)) - math.log(2)
    torch.testing.assert_close(
        vmf_log_normalizer(kappa, 3), torch.log(kappa) - math.log(4 * math.pi) - sinh, rtol=1e-13, atol=1e-13
    )
    wanted = 1 / torch.tanh(kappa[1:]) - 1 / kappa[1:]
    torch.testing.assert_close(vmf_mean_length(kappa[1:], 3), wanted, rtol=1e-12, atol=0)


def test_the_normaliser_is_scipys():
    mean = torch.nn.functional.normalize(torch.ones(20, dtype=torch.float64), dim=0).numpy()
    wanted = scipy.stats.vonmises_fisher(mean, 12.5).logpdf(mean) - 12.5
    got = vmf_log_normalizer(torch.tensor(12.5, dtype=torch.float64), 20)
    assert float(got) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(("dim", "kappa"), [(2, 3.0), (3, 0.5), (10, 40.0), (300, 900.0)])
def test_samples_have_the_mean_that_the_distribution_has(dim, kappa):
    torch.manual_seed(0)
    mean = torch.nn.functional.normalize(torch.randn(dim, dtype=torch.float64), dim=0)
    x = sample_vmf(mean, kappa, 20000)
    torch.testing.assert_close(x.norm(dim=1), torch.ones(20000, dtype=torch.float64))
    along = x @ mean
    wanted = float(vmf_mean_length(torch.tensor(kappa, dtype=torch.float64), dim))
    assert float(along.mean()) == pytest.approx(wanted, abs=5 * float(along.std()) / math.sqrt(20000))
    # The variance along the mean is A'(kappa).
    variance = 1 - wanted**2 - (dim - 1) / kappa * wanted
    assert float(along.var()) == pytest.approx(variance, rel=0.05)


@pytest.mark.parametrize("length", [1e-3, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("dim", [2, 3, 2048, 32768])
def test_the_fit_solves_its_equation(dim, length):
    x = torch.zeros(2, dim, dtype=torch.float64)
    x[:, 0] = length
    x[:, 1] = torch.tensor([1.0, -1.0]) * math.sqrt(1 - length**2)
    mean, kappa = fit_vmf(x)
    assert mean[0] == 1
    assert float(vmf_mean_length(kappa, dim)) == pytest.approx(length, rel=1e-8)


def test_wrong_shapes_are_named():
    with pytest.raises(
        ValueError, match=r"x must be \(N, d\), unit vectors of at least two numbers: got \(3,\)"
    ):
        fit_vmf(torch.zeros(3))
    with pytest.raises(
        ValueError, match=r"mean must be \(d,\), a unit vector of at least two numbers: got \(1,\)"
    ):
        sample_vmf(torch.zeros(1), 1.0, 4)
