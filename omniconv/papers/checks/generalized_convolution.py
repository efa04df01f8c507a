"""One convolution over a semiring and a monoid recognises languages, counts parses, multiplies polynomials and filters
images, whichever way its functions are represented.

Random numbers are eighths and small integers, so that all comparisons but those with torch and numpy are exact.
"""

import itertools
import math
import random
import re
import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from omniconv.ops.algebra.arrays import convolve
from omniconv.ops.algebra.languages import Regex, Trie
from omniconv.ops.algebra.maps import WORDS, Finite, Function
from omniconv.ops.algebra.semirings import (
    BOOLEAN,
    COUNTING,
    MAX_PLUS,
    MIN_PLUS,
    PROBABILITY,
    REAL,
    Semiring,
)
from omniconv.papers.check import Check

CASES = 500
PATTERNS = 200
ERROR = 1e-6
GROWTH = 2.0
LENGTHS = (500, 1000, 2000, 4000, 8000)
ROUNDS = 5

DRAW: dict[Semiring, Callable[[random.Random], Any]] = {
    BOOLEAN: lambda r: r.random() < 0.5,
    COUNTING: lambda r: r.randrange(4),
    REAL: lambda r: r.randrange(-8, 9) / 8,
    PROBABILITY: lambda r: r.randrange(9) / 8,
    MIN_PLUS: lambda r: r.choice([math.inf, *map(float, range(-3, 4))]),
    MAX_PLUS: lambda r: r.choice([-math.inf, *map(float, range(-3, 4))]),
}
ALL_WORDS = ["".join(w) for n in range(7) for w in itertools.product("ab", repeat=n)]


def laws_broken(s: Semiring, a: Any, b: Any, c: Any) -> int:
    """Return how many of the laws of a semiring do not hold for three values."""
    add, multiply = s.add, s.multiply
    laws = (
        add(add(a, b), c) == add(a, add(b, c)),
        add(a, b) == add(b, a),
        multiply(multiply(a, b), c) == multiply(a, multiply(b, c)),
        multiply(a, add(b, c)) == add(multiply(a, b), multiply(a, c)),
        multiply(add(a, b), c) == add(multiply(a, c), multiply(b, c)),
        add(a, s.zero) == a == multiply(a, s.one) == multiply(s.one, a),
        multiply(a, s.zero) == s.zero == multiply(s.zero, a),
    )
    return laws.count(False)


def expression(s: Semiring, table: dict[str, Any]) -> Regex:
    """Return the regular expression of a table of words."""
    total = Regex.value(s, s.zero)
    for word, value in table.items():
        total = total + Regex.word(s, word).scale(value)
    return total


def random_cases() -> dict[str, int]:
    """Return how often, over all cases, a law fails or two representations differ at some word."""
    rng = random.Random(0)
    faults = {"laws": 0, "associativity": 0, "distributivity": 0, "representations": 0, "stars": 0}
    semirings = list(DRAW)
    for case in range(CASES):
        s = semirings[case % len(semirings)]
        draw = DRAW[s]
        faults["laws"] += laws_broken(s, draw(rng), draw(rng), draw(rng))
        tables = [{w: draw(rng) for w in rng.sample(ALL_WORDS[:7], 3)} for _ in range(3)]
        f, g, h = (Finite(s, WORDS, table) for table in tables)
        faults["associativity"] += (f * g) * h != f * (g * h)
        whole = f * (g + h)
        faults["distributivity"] += whole != f * g + f * h
        ways: tuple[Callable[[dict[str, Any]], Any], ...] = (
            lambda t, s=s: Function(s, WORDS, Finite(s, WORDS, t).__getitem__),
            lambda t, s=s: Trie.finite(s, t),
            lambda t, s=s: expression(s, t),
        )
        others = []
        for make in ways:
            p: list[Any] = [make(table) for table in tables]
            others.append(p[0] * (p[1] + p[2]))
        faults["representations"] += any(other[w] != whole[w] for other in others for w in ALL_WORDS)
        # Without the empty word, so that all stars exist.
        proper = {w: v for w, v in tables[0].items() if w}
        function = Function(s, WORDS, Finite(s, WORDS, proper).__getitem__).star()
        stars = Trie.finite(s, proper).star(), expression(s, proper).star()
        faults["stars"] += any(star[w] != function[w] for star in stars for w in ALL_WORDS)
    return faults


def random_pattern(rng: random.Random, depth: int) -> tuple[Regex, str]:
    """Return an expression and the pattern of Python's `re` that means the same."""
    kind = rng.choice(["word", "word", "sum", "product", "star"]) if depth else "word"
    if kind == "word":
        word = rng.choice(["a", "b", "ab", ""])
        return Regex.word(BOOLEAN, word), word
    p, left = random_pattern(rng, depth - 1)
    if kind == "star":
        return p.star(), f"(?:{left})*"
    q, right = random_pattern(rng, depth - 1)
    return (p + q, f"(?:{left}|{right})") if kind == "sum" else (p * q, f"(?:{left})(?:{right})")


def disagreements_with_re() -> int:
    """Return for how many patterns and words an expression or its trie says otherwise than `re`."""
    rng, wrong = random.Random(1), 0
    for _ in range(PATTERNS):
        language, pattern = random_pattern(rng, 4)
        trie, compiled = Trie.of(language), re.compile(pattern)
        for word in ALL_WORDS:
            wanted = compiled.fullmatch(word) is not None
            wrong += language[word] != wanted or trie[word] != wanted
    return wrong


def wrong_counts() -> int:
    """Return for how many words the number of ways to cut them, or to parse them, is not that of brute force."""
    parts = {"a": 1, "ab": 1, "b": 1, "ba": 2, "aab": 1}

    @cache
    def cuts(word: str) -> int:
        return (
            1 if not word else sum(n * cuts(word[len(p) :]) for p, n in parts.items() if word.startswith(p))
        )

    @cache
    def trees(word: str) -> int:
        """Count derivations of T -> a | b T | a T T."""
        total = int(word == "a") + (trees(word[1:]) if word[:1] == "b" else 0)
        if word[:1] == "a":
            total += sum(trees(word[1:i]) * trees(word[i:]) for i in range(2, len(word)))
        return total

    a, b = (Trie.finite(COUNTING, {c: 1}) for c in "ab")
    again = Trie.defer(COUNTING, lambda: grammar)
    grammar = a + b * again + a * again * again
    forms = Trie.finite(COUNTING, parts).star(), expression(COUNTING, parts).star()
    wrong = sum(form[word] != cuts(word) for form in forms for word in ALL_WORDS)
    return wrong + sum(grammar[word] != trees(word) for word in ALL_WORDS)


def array_errors() -> dict[str, float]:
    """Return the largest differences from numpy, torch, and loops over all pairs."""
    random_ = torch.Generator().manual_seed(0)
    p, q = (torch.randn(n, generator=random_, dtype=torch.float64) for n in (30, 17))
    image, kernel = torch.randn(40, 31, generator=random_), torch.randn(5, 4, generator=random_)
    full = F.conv2d(image[None, None], kernel.flip(0, 1)[None, None], padding=(4, 3))[0, 0]
    x, y = torch.randn(9, 8, generator=random_), torch.randn(3, 4, generator=random_)
    tropical = np.full((11, 11), np.inf, np.float32)
    for u in itertools.product(range(9), range(8)):
        for v in itertools.product(range(3), range(4)):
            w = u[0] + v[0], u[1] + v[1]
            tropical[w] = min(tropical[w], (x[u] + y[v]).item())
    return {
        "polynomials from numpy.polymul": float(np.abs(convolve(p, q).numpy() - np.polymul(p, q)).max()),
        "images from torch's conv2d": float((convolve(image, kernel) - full).abs().max()),
        "min-plus from brute force": float(np.abs(convolve(x, y, MIN_PLUS).numpy() - tropical).max()),
    }


def growth() -> tuple[float, dict[int, float]]:
    """Return the exponent with which the time to match a^n in (a + a)* grows, and the times."""
    times = {}
    for n in LENGTHS:
        rounds = []
        for _ in range(ROUNDS):
            a = Trie.finite(BOOLEAN, {"a": True})
            started = time.perf_counter()
            if not (a + a).star()["a" * n]:
                return math.nan, times
            rounds.append(time.perf_counter() - started)
        times[n] = statistics.median(rounds)
    return float(np.polyfit(np.log(list(times)), np.log(list(times.values())), 1)[0]), times


def run(check: Check) -> None:
    """Measure laws, agreement of representations, languages, arrays, and the growth of matching."""
    for what, faults in random_cases().items():
        check.require(f"faults of {what} in {CASES} random cases, words up to 6 letters", faults, "==", 0)
    check.require(
        f"words on which an expression differs from re, {PATTERNS} patterns", disagreements_with_re(), "==", 0
    )
    check.require("words whose parses are counted wrongly", wrong_counts(), "==", 0)
    for what, error in array_errors().items():
        check.require(f"difference of {what}", error, "<=", ERROR)
    exponent, times = growth()
    check.require("growth exponent of matching a^n in (a + a)* by a trie", exponent, "<=", GROWTH)
    check.note(f"seconds to match: {times}")
