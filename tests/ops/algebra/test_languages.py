"""Tries and expressions against Python's `re`, brute force, and each other."""

import itertools
import random
import re

import pytest

from omniconv.ops.algebra.languages import Regex, Trie
from omniconv.ops.algebra.maps import WORDS, Finite, Function
from omniconv.ops.algebra.semirings import BOOLEAN, COUNTING, MIN_PLUS, REAL

SHORT = ["".join(w) for n in range(6) for w in itertools.product("ab", repeat=n)]


def draw(rng, depth, semiring=BOOLEAN):
    """Return an expression and the pattern of `re` that means the same."""
    kind = rng.choice(["symbol", "symbol", "sum", "product", "star"]) if depth else "symbol"
    if kind == "symbol":
        word = rng.choice(["a", "b", ""])
        return Regex.word(semiring, word), word
    p, left = draw(rng, depth - 1, semiring)
    if kind == "star":
        return p.star(), f"(?:{left})*"
    q, right = draw(rng, depth - 1, semiring)
    return (p + q, f"(?:{left}|{right})") if kind == "sum" else (p * q, f"(?:{left})(?:{right})")


def test_expressions_and_tries_accept_what_re_accepts():
    rng = random.Random(0)
    for _ in range(60):
        expression, pattern = draw(rng, 4)
        trie = Trie.of(expression)
        for word in SHORT:
            wanted = re.fullmatch(pattern, word) is not None
            assert expression[word] == wanted, (pattern, word)
            assert trie[word] == wanted, (pattern, word)


@pytest.mark.parametrize("semiring", [BOOLEAN, COUNTING, REAL, MIN_PLUS], ids=repr)
def test_all_representations_agree(semiring):
    rng = random.Random(1)
    value = {
        BOOLEAN: lambda: rng.random() < 0.5,
        COUNTING: lambda: rng.randrange(4),
        REAL: lambda: rng.randrange(-4, 5) / 8,
        MIN_PLUS: lambda: float(rng.randrange(5)),
    }[semiring]
    for _ in range(10):
        tables = [{w: value() for w in rng.sample(SHORT[1:15], 4)} for _ in range(2)]
        finites = [Finite(semiring, WORDS, t) for t in tables]
        functions = [Function(semiring, WORDS, f.__getitem__) for f in finites]
        tries = [Trie.finite(semiring, t) for t in tables]
        expressions = []
        for t in tables:
            expression = Regex.value(semiring, semiring.zero)
            for word, v in t.items():
                expression = expression + Regex.word(semiring, word).scale(v)
            expressions.append(expression)
        for word in SHORT:
            products = {(f[0] * f[1])[word] for f in (functions, finites, tries, expressions)}
            sums = {(f[0] + f[1])[word] for f in (functions, finites, tries, expressions)}
            stars = {f[0].star()[word] for f in (functions, tries, expressions)}
            assert len(products) == len(sums) == len(stars) == 1, word


def test_a_star_whose_inside_holds_the_empty_word():
    for semiring, inside in ((REAL, 0.25), (MIN_PLUS, 3.0)):
        table = {"": inside, "a": 0.5, "ab": 0.125}
        function = Function(semiring, WORDS, lambda w, s=semiring, t=table: t.get(w, s.zero)).star()
        trie = Trie.finite(semiring, table).star()
        for word in SHORT:
            assert trie[word] == pytest.approx(function[word])


def test_grammars_define_tries_by_themselves():
    left, right = (Trie.finite(COUNTING, {c: 1}) for c in "ab")
    one = Trie.value(COUNTING, 1)
    nested = one + left * Trie.defer(COUNTING, lambda: nested) * right
    balanced = one + left * Trie.defer(COUNTING, lambda: balanced) * right * Trie.defer(
        COUNTING, lambda: balanced
    )
    for word in ["".join(w) for n in range(9) for w in itertools.product("ab", repeat=n)]:
        half = len(word) // 2
        assert nested[word] == (word == "a" * half + "b" * half)
        depth = list(itertools.accumulate((1 if c == "a" else -1 for c in word), initial=0))
        assert balanced[word] == (depth[-1] == 0 and min(depth) >= 0)


def test_ambiguous_grammars_count_their_parses():
    # Trees whose n nodes have at most two children, written as a word of n letters: Motzkin's numbers.
    a = Trie.finite(COUNTING, {"a": 1})
    again = Trie.defer(COUNTING, lambda: tree)
    tree = a + a * again + a * again * again
    assert [tree["a" * n] for n in range(8)] == [0, 1, 1, 2, 4, 9, 21, 51]
    words = Trie.finite(COUNTING, {"a": 1, "aa": 1, "aaa": 1}).star()
    assert [words["a" * n] for n in range(8)] == [1, 1, 2, 4, 7, 13, 24, 44]


def test_equal_terms_of_a_sum_become_one():
    a = Regex.word(BOOLEAN, "a")
    assert a + a == a
    assert str((a + a).star() * Regex.word(BOOLEAN, "b")) == "a*b"
    doubled = Regex.word(COUNTING, "a") + Regex.word(COUNTING, "a")
    assert str(doubled) == "2·a"
    expression, sizes = a.star() * a.star() * a.star(), []
    for _ in range(20):
        expression = expression.derivative("a")
        sizes.append(len(expression.terms))
    assert max(sizes) == sizes[-1] <= 4
