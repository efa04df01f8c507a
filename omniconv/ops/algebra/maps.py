r"""Functions from a monoid to a semiring, as plain functions and as dictionaries.

.. math:: (f * g)(w) = \sum_{u \cdot v = w} f(u)\, g(v)

With words as keys this is concatenation of languages, with natural numbers the product of polynomials, with pairs of
integers the convolution of images. Paper: Elliott, https://arxiv.org/abs/1903.10677. Functions of one semiring and
monoid form a semiring again: `+`, `*` and `star`.
"""

import itertools
import operator
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

from omniconv.ops.algebra.semirings import Semiring

__all__ = ["INTEGERS", "NATURALS", "WORDS", "Finite", "Function", "Monoid", "power"]


@dataclass(frozen=True)
class Monoid:
    """What the keys of a function are joined by.

    Attributes:
        name: what it is called.
        empty: neutral for `join`.
        join: associative.
        splits: all pairs that join to a key, those with an empty first half first; None if there are infinitely many.
    """

    name: str
    empty: Hashable
    join: Callable[[Any, Any], Any]
    splits: Callable[[Any], Iterable[tuple[Any, Any]]] | None

    def __repr__(self) -> str:
        return self.name


WORDS = Monoid("words", "", operator.add, lambda w: [(w[:i], w[i:]) for i in range(len(w) + 1)])
NATURALS = Monoid("naturals", 0, operator.add, lambda n: [(i, n - i) for i in range(n + 1)])
INTEGERS = Monoid("integers", 0, operator.add, None)


def power(monoid: Monoid, count: int) -> Monoid:
    """Return the monoid of tuples of `count` keys, such as the exponents of several variables."""

    def splits(key: tuple[Any, ...]) -> Iterable[tuple[Any, Any]]:
        assert monoid.splits is not None
        for pairs in itertools.product(*map(monoid.splits, key)):
            yield tuple(u for u, _ in pairs), tuple(v for _, v in pairs)

    return Monoid(
        f"{count} {monoid.name}",
        (monoid.empty,) * count,
        lambda u, v: tuple(map(monoid.join, u, v)),
        None if monoid.splits is None else splits,
    )


def _total(semiring: Semiring, values: Iterable[Any]) -> Any:
    return reduce(semiring.add, values, semiring.zero)


class Function:
    """A function as it is, convolved by its definition; slow, and what the other representations mean.

    Args:
        semiring: of the values.
        monoid: of the keys, with finitely many splits.
        value: key -> value.

    Raises:
        ValueError: if keys split in infinitely many ways.
    """

    def __init__(self, semiring: Semiring, monoid: Monoid, value: Callable[[Any], Any]) -> None:
        if monoid.splits is None:
            raise ValueError(f"plain functions are convolved over all splits; {monoid} have infinitely many")
        self.semiring, self.monoid, self.splits, self._value = semiring, monoid, monoid.splits, value

    def __getitem__(self, key: Any) -> Any:
        return self._value(key)

    def __add__(self, other: "Function") -> "Function":
        return Function(self.semiring, self.monoid, lambda w: self.semiring.add(self[w], other[w]))

    def __mul__(self, other: "Function") -> "Function":
        s = self.semiring
        return Function(
            s, self.monoid, lambda w: _total(s, (s.multiply(self[u], other[v]) for u, v in self.splits(w)))
        )

    def star(self) -> "Function":
        r"""Return the sum of all powers, by :math:`f^* = f(\epsilon)^* (1 + (f - f(\epsilon)) f^*)`."""
        s, known = self.semiring, {}

        def value(w: Any) -> Any:
            if w not in known:
                first = s.one if w == self.monoid.empty else s.zero
                rest = (s.multiply(self[u], value(v)) for u, v in self.splits(w) if u != self.monoid.empty)
                known[w] = s.multiply(s.star(self[self.monoid.empty]), s.add(first, _total(s, rest)))
            return known[w]

        return Function(s, self.monoid, value)


class Finite:
    """A function that is zero but for finitely many keys: a dictionary.

    Args:
        semiring: of the values.
        monoid: of the keys.
        values: key -> value; zeros are left out.
    """

    def __init__(self, semiring: Semiring, monoid: Monoid, values: Mapping[Any, Any]) -> None:
        self.semiring, self.monoid = semiring, monoid
        self.values = {key: value for key, value in values.items() if value != semiring.zero}

    def __getitem__(self, key: Any) -> Any:
        return self.values.get(key, self.semiring.zero)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Finite) and self.values == other.values

    def __repr__(self) -> str:
        return f"Finite({self.semiring}, {self.monoid}, {self.values})"

    def _collect(self, pairs: Iterable[tuple[Any, Any]]) -> "Finite":
        values: dict[Any, Any] = {}
        for key, value in pairs:
            values[key] = self.semiring.add(values[key], value) if key in values else value
        return Finite(self.semiring, self.monoid, values)

    def __add__(self, other: "Finite") -> "Finite":
        return self._collect(itertools.chain(self.values.items(), other.values.items()))

    def __mul__(self, other: "Finite") -> "Finite":
        join, multiply = self.monoid.join, self.semiring.multiply
        return self._collect(
            (join(u, v), multiply(a, b)) for u, a in self.values.items() for v, b in other.values.items()
        )
