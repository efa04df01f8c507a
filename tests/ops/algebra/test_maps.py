"""Semirings, functions and dictionaries against hand-made sums over all splits."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniconv.ops.algebra.languages import Regex, regular_expressions
from omniconv.ops.algebra.maps import INTEGERS, NATURALS, WORDS, Finite, Function, power
from omniconv.ops.algebra.semirings import BOOLEAN, COUNTING, MAX_PLUS, MIN_PLUS, PROBABILITY, REAL

# Eighths: sums and products of a few are exact.
VALUES = {
    BOOLEAN: st.booleans(),
    COUNTING: st.integers(0, 9),
    REAL: st.integers(-8, 8).map(lambda i: i / 8),
    PROBABILITY: st.integers(0, 8).map(lambda i: i / 8),
    MIN_PLUS: st.one_of(st.just(math.inf), st.integers(-9, 9).map(float)),
    MAX_PLUS: st.one_of(st.just(-math.inf), st.integers(-9, 9).map(float)),
}


@pytest.mark.parametrize("semiring", VALUES, ids=repr)
def test_semirings_keep_their_laws(semiring):
    add, multiply, zero, one = semiring.add, semiring.multiply, semiring.zero, semiring.one

    @given(*[VALUES[semiring]] * 3)
    def laws(a, b, c):
        assert add(add(a, b), c) == add(a, add(b, c))
        assert add(a, b) == add(b, a)
        assert multiply(multiply(a, b), c) == multiply(a, multiply(b, c))
        assert multiply(a, add(b, c)) == add(multiply(a, b), multiply(a, c))
        assert multiply(add(a, b), c) == add(multiply(a, c), multiply(b, c))
        assert add(a, zero) == a == multiply(a, one) == multiply(one, a)
        assert multiply(a, zero) == zero == multiply(zero, a)

    laws()


@pytest.mark.parametrize(
    ("semiring", "values"),
    [
        (BOOLEAN, [False, True]),
        (REAL, [0, 0.5, -0.75]),
        (PROBABILITY, [0, 0.5]),
        (MIN_PLUS, [0.0, 2.0, math.inf]),
        (MAX_PLUS, [0.0, -2.0, -math.inf]),
        (COUNTING, [0, 1]),
    ],
    ids=repr,
)
def test_a_star_is_one_plus_itself_times_a(semiring, values):
    for a in values:
        star = semiring.star(a)
        again = semiring.add(semiring.one, semiring.multiply(a, star))
        assert star == again or star == pytest.approx(again)


def test_a_sum_that_does_not_converge_is_refused():
    with pytest.raises(ValueError, match="must be between -1 and 1: got 1"):
        REAL.star(1)


def test_dictionaries_multiply_as_polynomials():
    p, q = [1.0, -2, 0, 3], [0.5, 4, 1]
    left, right = (Finite(REAL, NATURALS, dict(enumerate(c))) for c in (p, q))
    expected = np.polymul(p[::-1], q[::-1])[::-1]
    assert left * right == Finite(REAL, NATURALS, dict(enumerate(expected)))


def test_functions_dictionaries_and_several_variables_agree():
    keys = power(NATURALS, 2)
    f = Finite(COUNTING, keys, {(0, 0): 2, (1, 0): 3, (0, 2): 5})
    g = Finite(COUNTING, keys, {(0, 0): 1, (1, 1): 7})
    product = Function(COUNTING, keys, f.__getitem__) * Function(COUNTING, keys, g.__getitem__)
    for key in itertools.product(range(4), repeat=2):
        assert product[key] == (f * g)[key]
    assert (f * g)[1, 1] == 14
    assert (f + g)[0, 0] == 3


def test_keys_may_be_negative_in_dictionaries_alone():
    f = Finite(REAL, INTEGERS, {-1: 1.0, 1: -1.0})
    assert f * f == Finite(REAL, INTEGERS, {-2: 1.0, 0: -2.0, 2: 1.0})
    with pytest.raises(ValueError, match="integers have infinitely many"):
        Function(REAL, INTEGERS, f.__getitem__)


def test_the_star_of_a_function_counts_ways_to_cut_a_word():
    f = Function(COUNTING, WORDS, lambda w: int(w in ("a", "aa")))
    assert [f.star()["a" * n] for n in range(7)] == [1, 1, 2, 3, 5, 8, 13]


def test_expressions_are_a_semiring_themselves():
    s = regular_expressions(BOOLEAN)
    a, b = Regex.word(BOOLEAN, "a"), Regex.word(BOOLEAN, "b")
    for word in ("", "a", "b", "ab", "abab", "ba"):
        expected = word in ("", "ab", "abab")
        assert s.star(s.multiply(a, b))[word] == expected
        assert s.add(s.zero, s.multiply(s.one, s.star(s.multiply(a, b))))[word] == expected
