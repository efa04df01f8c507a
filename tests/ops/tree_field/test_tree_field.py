"""Tree-field integration against explicit matrices of distances, which scipy computes."""

import math

import numpy as np
import pytest
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import minimum_spanning_tree, shortest_path
from torch.autograd import gradcheck

from omniconv.ops.tree_field.api import tree_field
from omniconv.ops.tree_field.functions import (
    Cosine,
    Exponential,
    ExponentiatedPolynomial,
    Polynomial,
    Rational,
)
from omniconv.ops.tree_field.tree import LEAF, IntegratorTree, spanning_tree


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


FUNCTIONS = {
    "polynomial": Polynomial(numbers(0.3, -0.2, 0.05, 0.01)),
    "exponential": Exponential(numbers(-0.3)[0], 2.0),
    "cosine": Cosine(numbers(0.7)[0], 0.3),
    "rational": Rational(numbers(1, 0.5), numbers(1, 0.2, 0.7)),
    "cauchy": Rational(numbers(1), numbers(0.5, 1)),
    "quadratic": ExponentiatedPolynomial(numbers(0.1, -0.05, -0.02)),
    "plain": lambda z: torch.atan(1 + z),
}


def draw_tree(kind, n, whole, seed=0):
    """Return edges and weights with the vertices in random order."""
    random = np.random.default_rng(seed)
    upto = np.arange(1, n)
    parents = {"random": (random.random(n - 1) * upto).astype(int), "path": upto - 1, "star": 0 * upto}[kind]
    names = random.permutation(n)
    weights = random.integers(1, 6, n - 1) if whole else random.uniform(0.1, 2, n - 1)
    return np.stack([names[parents], names[upto]], 1), weights.astype(float)


def distances(edges, weights):
    n = len(edges) + 1
    return torch.as_tensor(shortest_path(coo_matrix((weights, edges.T), (n, n)).tocsr(), directed=False))


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("kind", ["random", "path", "star"])
@pytest.mark.parametrize("n", [2, 7, LEAF, LEAF + 1, 300])
def test_every_function_on_every_tree_equals_the_explicit_matrix(kind, n, whole):
    edges, weights = draw_tree(kind, n, whole)
    tree, d = IntegratorTree.of(edges, weights), distances(edges, weights)
    x = torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for name, f in FUNCTIONS.items():
        expected = f(d) @ x
        error = (tree_field(x, tree, f) - expected).norm() / expected.norm()
        assert error < 1e-9, (name, error)


@pytest.mark.parametrize("method", ["lattice", "chebyshev", "dense"])
def test_every_method_gives_the_same(method):
    edges, weights = draw_tree("random", 200, True)
    tree, d = IntegratorTree.of(edges, weights), distances(edges, weights)
    x = torch.randn(200, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for name, f in FUNCTIONS.items():
        expected = f(d) @ x
        error = (tree_field(x, tree, f, method=method) - expected).norm() / expected.norm()
        assert error < 1e-9, (name, error)


def test_a_function_that_no_polynomial_follows_is_multiplied_as_it_is():
    edges, weights = draw_tree("random", 200, False)
    d = distances(edges, weights)
    x = torch.randn(200, 2, dtype=torch.float64)

    def jump(z):
        return (z < 5.3).to(z)

    torch.testing.assert_close(tree_field(x, IntegratorTree.of(edges, weights), jump), jump(d) @ x)


@pytest.mark.parametrize("kind", ["random", "path", "star"])
def test_both_parts_of_every_cut_hold_a_quarter_to_three_quarters(kind):
    for n in (33, 34, 35, 36, 500, 3001):
        parts = IntegratorTree.of(*draw_tree(kind, n, False, seed=n)).parts
        whole = parts.sum(1) - 1
        assert len(parts) > 0
        assert (4 * parts >= whole[:, None]).all()
        assert (4 * parts <= 3 * whole[:, None]).all()


def test_the_levels_are_few_and_hold_every_vertex_about_once():
    tree = IntegratorTree.of(*draw_tree("path", 4096, False))
    held = sum(int((cuts.vertex < tree.count).sum()) for cuts in tree.cuts)
    assert held <= 4096 * math.log2(4096 / LEAF) + 4096


def test_interpolation_reaches_the_rounding_of_float32():
    edges, weights = draw_tree("path", 300, False)
    tree, d = IntegratorTree.of(edges, weights), distances(edges, weights)
    x = torch.randn(300, 2, generator=torch.Generator().manual_seed(1))
    f = Rational(torch.tensor([1.0]), torch.tensor([1.0, 0.2, 0.7]))
    expected = f(d) @ x.double()
    for method in ("chebyshev", "dense"):
        error = (tree_field(x, tree, f, method=method) - expected).norm() / expected.norm()
        assert error < 1e-5, method


def test_leading_axes_and_float32():
    edges, weights = draw_tree("random", 90, True)
    tree, d = IntegratorTree.of(edges, weights), distances(edges, weights)
    x = torch.randn(2, 3, 90, 5)
    f = ExponentiatedPolynomial(torch.tensor([0.0, -0.1]))
    y = tree_field(x, tree, f)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, f(d.float()) @ x, rtol=1e-5, atol=1e-5)
    half = tree_field(x.bfloat16(), tree, f)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), y, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("whole", [True, False])
def test_gradients_of_field_and_parameters(whole):
    tree = IntegratorTree.of(*draw_tree("random", 120, whole))
    x = torch.randn(120, 1, dtype=torch.float64, requires_grad=True)
    makers = {
        "polynomial": (lambda a: Polynomial(a), (0.3, -0.2, 0.05)),
        "exponential": (lambda a: Exponential(a[0], a[1]), (-0.3, 2.0)),
        "cosine": (lambda a: Cosine(a[0], a[1]), (0.7, 0.3)),
        "rational": (lambda a: Rational(a[:1], a[1:]), (1.0, 1.0, 0.2, 0.7)),
        "quadratic": (lambda a: ExponentiatedPolynomial(a), (0.1, -0.05, -0.02)),
    }
    for make, values in makers.values():
        a = numbers(*values).requires_grad_()
        assert gradcheck(lambda x, a, make=make: tree_field(x, tree, make(a)), (x, a), fast_mode=True)


def test_a_spanning_tree_is_that_of_scipy():
    random = np.random.default_rng(0)
    edges = np.stack(np.triu_indices(12, 1), 1)
    weights = random.uniform(0.5, 1, len(edges))
    chosen, lengths = spanning_tree(edges, weights)
    assert len(chosen) == 11
    expected = minimum_spanning_tree(coo_matrix((weights, edges.T), (12, 12))).sum()
    assert lengths.sum() == pytest.approx(expected)


def test_the_step_of_lattice_weights():
    edges = np.array([[0, 1], [1, 2], [2, 3]])
    assert IntegratorTree.of(edges, np.array([4.0, 6, 10])).step == 2
    assert IntegratorTree.of(edges, np.array([0.1, 0.3, 0.2])).step == pytest.approx(0.1)
    assert IntegratorTree.of(edges, np.array([0.1, 0.25, 0.2])).step is None
    assert IntegratorTree.of(edges, np.array([1.0, 1e6, 1])).step is None


def test_what_is_no_tree_is_refused():
    cycle = np.array([[0, 1], [1, 2], [2, 0]])
    with pytest.raises(ValueError, match="edges must form a tree: vertex 0 reaches 3 of 4 vertices"):
        IntegratorTree.of(cycle)
    with pytest.raises(ValueError, match="3 edges of a tree join vertices 0 to 3: got 0 to 4"):
        IntegratorTree.of(np.array([[0, 1], [1, 2], [2, 4]]))
    with pytest.raises(ValueError, match="weights must be 1 positive numbers, one an edge"):
        IntegratorTree.of(cycle[:1], np.array([0.0]))


def test_wrong_calls_are_refused():
    tree = IntegratorTree.of(np.array([[0, 1], [1, 2]]), np.array([1.0, 0.3]))
    f = Exponential(-1.0)
    with pytest.raises(ValueError, match=r"x must be \(\*, 3, D\), one row a vertex: got \(4, 2\)"):
        tree_field(torch.zeros(4, 2), tree, f)
    with pytest.raises(ValueError, match="method must be one of auto, lattice, chebyshev, dense: got 'fft'"):
        tree_field(torch.zeros(3, 2), tree, f, method="fft")
    with pytest.raises(ValueError, match="method 'lattice' needs weights that are small multiples"):
        tree_field(torch.zeros(3, 2), tree, f, method="lattice")
