"""Clebsch-Gordan coefficients against sympy, integrals of three harmonics, and what they are for."""

import itertools
import math

import numpy as np
import pytest
import torch

from omniconv.ops.clebsch_gordan import clebsch_gordan, complex_clebsch_gordan
from omniconv.ops.spherical_harmonics import rotation_matrices, sphere_points, spherical_harmonics

TRIPLES = [(a, b, c) for a, b in itertools.product(range(4), repeat=2) for c in range(abs(a - b), a + b + 1)]


def test_complex_ones_are_sympys():
    cg = pytest.importorskip("sympy.physics.quantum.cg")
    for j1, m1, j2, m2, j in [
        (1, 0, 1, 0, 2),
        (2, -1, 3, 2, 4),
        (3, 3, 2, -2, 1),
        (4, 1, 4, -1, 0),
        (2, 0, 2, 0, 3),
    ]:
        wanted = float(cg.CG(j1, m1, j2, m2, j, m1 + m2).doit())
        assert complex_clebsch_gordan(j1, m1, j2, m2, j, m1 + m2) == pytest.approx(wanted, abs=1e-14)


@pytest.mark.parametrize("triple", [t for t in TRIPLES if sum(t) % 2 == 0])
def test_even_sums_are_integrals_of_three_harmonics(triple):
    a, b, c = triple
    points, weights = sphere_points(a + b + c)
    y = spherical_harmonics(torch.from_numpy(points), max(triple)).numpy()
    parts = [y[:, n * n : (n + 1) ** 2] for n in triple]
    integral = np.einsum("p,px,py,pz->xyz", weights, *parts)
    scale = math.sqrt((2 * a + 1) * (2 * b + 1) / (4 * math.pi * (2 * c + 1)))
    scale *= complex_clebsch_gordan(a, 0, b, 0, c, 0)
    np.testing.assert_allclose(scale * clebsch_gordan(a, b, c), integral, atol=1e-13)


@pytest.mark.parametrize("triple", TRIPLES)
def test_couplings_turn_with_the_third_degree(triple):
    q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))
    turns = rotation_matrices(torch.from_numpy(q * np.linalg.det(q)), max(triple))
    a, b, c = (turns[n].numpy() for n in triple)
    coupling = clebsch_gordan(*triple)
    turned = np.einsum("xyz,xa,yb->abz", coupling, a, b)
    np.testing.assert_allclose(turned, np.einsum("abc,zc->abz", coupling, c), atol=1e-12)
    np.testing.assert_allclose(np.einsum("abc,abd->cd", coupling, coupling), np.eye(len(c)), atol=1e-13)


def test_a_high_degree_is_as_exact():
    coupling = clebsch_gordan(8, 16, 8)
    np.testing.assert_allclose(np.einsum("abc,abd->cd", coupling, coupling), np.eye(17), atol=1e-13)
