r"""Weighted languages: functions of words, known by their value at the empty word and their derivatives.

.. math:: f(\epsilon), \qquad (\partial_c f)(w) = f(c w)

Both are all that it takes to look a word up, and both pass through sums, convolutions and stars:

.. math:: (f * g)(\epsilon) = f(\epsilon) g(\epsilon), \quad
    \partial_c (f * g) = f(\epsilon) \cdot \partial_c g + \partial_c f * g, \quad
    \partial_c f^* = f(\epsilon)^* \cdot (\partial_c f * f^*)

Paper: Elliott, https://arxiv.org/abs/1903.10677, after Brzozowski's derivatives of regular expressions. `Trie` keeps
derivatives once they are known, `Regex` is symbolic.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any

from omniconv.ops.algebra.semirings import Semiring

__all__ = ["Language", "Regex", "Trie", "regular_expressions"]


class Language(ABC):
    """A function of words with values in a semiring; words are sequences of symbols.

    Attributes:
        semiring: of the values.
        at_empty: the value at the empty word.
    """

    semiring: Semiring
    at_empty: Any

    @abstractmethod
    def derivative(self, symbol: Hashable) -> "Language":
        """Return the function of what follows `symbol`."""

    def __getitem__(self, word: Iterable[Hashable]) -> Any:
        return reduce(lambda f, symbol: f.derivative(symbol), word, self).at_empty


class Trie(Language):
    """A tree of derivatives that grows as words are looked up.

    Since nothing is computed before it is asked for, a trie may be defined by itself, which makes grammars:
    `balanced = Trie.defer(s, lambda: one + left * balanced * right * balanced)`. No rule may begin with itself.

    Args:
        semiring: of the values.
        at_empty: computes the value at the empty word.
        derive: computes the derivative by a symbol; None if all are zero.
    """

    def __init__(
        self,
        semiring: Semiring,
        at_empty: Callable[[], Any],
        derive: "Callable[[Hashable], Trie] | None" = None,
    ) -> None:
        self.semiring, self._at_empty, self._derive = semiring, at_empty, derive
        self._known: dict[Hashable, Trie] = {}

    @classmethod
    def value(cls, semiring: Semiring, value: Any) -> "Trie":
        """Return the trie with `value` at the empty word and zero elsewhere."""
        return _Nothing(semiring) if value == semiring.zero else cls(semiring, lambda: value)

    @classmethod
    def finite(cls, semiring: Semiring, values: Mapping[Any, Any]) -> "Trie":
        """Return the trie of finitely many words and their values."""
        tails: dict[Hashable, dict[Any, Any]] = {}
        for word, value in values.items():
            if len(word):
                tails.setdefault(word[0], {})[word[1:]] = value
        empty = next((value for word, value in values.items() if not len(word)), semiring.zero)
        if not tails:
            return cls.value(semiring, empty)
        return cls(semiring, lambda: empty, lambda symbol: cls.finite(semiring, tails.get(symbol, {})))

    @classmethod
    def of(cls, language: Language) -> "Trie":
        """Return a trie of any language."""
        return cls(
            language.semiring, lambda: language.at_empty, lambda symbol: cls.of(language.derivative(symbol))
        )

    @classmethod
    def defer(cls, semiring: Semiring, define: "Callable[[], Trie]") -> "Trie":
        """Return what `define` gives, which is called at the first look."""
        return cls(semiring, lambda: define().at_empty, lambda symbol: define().derivative(symbol))

    @cached_property
    def at_empty(self) -> Any:
        """The value at the empty word."""
        return self._at_empty()

    def derivative(self, symbol: Hashable) -> "Trie":
        """Return the trie of what follows `symbol`."""
        if symbol not in self._known:
            self._known[symbol] = self._derive(symbol) if self._derive else _Nothing(self.semiring)
        return self._known[symbol]

    def scale(self, value: Any) -> "Trie":
        """Return the trie with all values multiplied by `value` from the left."""
        s = self.semiring
        if value == s.zero:
            return _Nothing(s)
        if value == s.one or isinstance(self, _Nothing):
            return self
        return Trie(
            s, lambda: s.multiply(value, self.at_empty), lambda symbol: self.derivative(symbol).scale(value)
        )

    def __add__(self, other: "Trie") -> "Trie":
        if isinstance(self, _Nothing):
            return other
        if isinstance(other, _Nothing):
            return self
        return Trie(
            self.semiring,
            lambda: self.semiring.add(self.at_empty, other.at_empty),
            lambda symbol: self.derivative(symbol) + other.derivative(symbol),
        )

    def __mul__(self, other: "Trie") -> "Trie":
        if isinstance(self, _Nothing) or isinstance(other, _Nothing):
            return _Nothing(self.semiring)
        s = self.semiring

        def at_empty() -> Any:
            # What a zero is multiplied by is not looked at: it may be defined by this very product.
            return s.zero if self.at_empty == s.zero else s.multiply(self.at_empty, other.at_empty)

        def derive(symbol: Hashable) -> Trie:
            later = self.derivative(symbol) * other
            if self.at_empty == s.zero:
                return later
            return other.derivative(symbol).scale(self.at_empty) + later

        return Trie(s, at_empty, derive)

    def star(self) -> "Trie":
        """Return the sum of all powers."""
        s = self.semiring
        closure = Trie(
            s,
            lambda: s.star(self.at_empty),
            lambda symbol: (self.derivative(symbol) * closure).scale(closure.at_empty),
        )
        return closure


class _Nothing(Trie):
    """The trie that is zero everywhere, told from others at a glance."""

    def __init__(self, semiring: Semiring) -> None:
        super().__init__(semiring, lambda: semiring.zero)


@dataclass(frozen=True)
class _Epsilon:
    """The empty word."""

    def at_empty(self, semiring: Semiring) -> Any:
        return semiring.one

    def derivative(self, semiring: Semiring, symbol: Hashable) -> "Regex":
        return Regex(semiring, {})

    def __str__(self) -> str:
        return "ε"


@dataclass(frozen=True)
class _Symbol:
    symbol: Hashable

    def at_empty(self, semiring: Semiring) -> Any:
        return semiring.zero

    def derivative(self, semiring: Semiring, symbol: Hashable) -> "Regex":
        return Regex(semiring, {_EPSILON: semiring.one} if symbol == self.symbol else {})

    def __str__(self) -> str:
        return str(self.symbol)


@dataclass(frozen=True)
class _Product:
    left: "Regex"
    right: "Regex"

    def at_empty(self, semiring: Semiring) -> Any:
        return semiring.multiply(self.left.at_empty, self.right.at_empty)

    def derivative(self, semiring: Semiring, symbol: Hashable) -> "Regex":
        return (
            self.right.derivative(symbol).scale(self.left.at_empty)
            + self.left.derivative(symbol) * self.right
        )

    def __str__(self) -> str:
        return f"{self.left}{self.right}"


@dataclass(frozen=True)
class _Star:
    inner: "Regex"

    def at_empty(self, semiring: Semiring) -> Any:
        return semiring.star(self.inner.at_empty)

    def derivative(self, semiring: Semiring, symbol: Hashable) -> "Regex":
        again = self.inner.derivative(symbol) * Regex(semiring, {self: semiring.one})
        return again.scale(semiring.star(self.inner.at_empty))

    def __str__(self) -> str:
        return f"{self.inner}*"


_EPSILON = _Epsilon()
_Atom = _Epsilon | _Symbol | _Product | _Star


class Regex(Language):
    """A regular expression with weights: a sum of different terms, each with its weight.

    Equal terms of a sum become one, so that an expression has finitely many derivatives wherever the semiring's
    sums do not grow, as the boolean one's.

    Args:
        semiring: of the values.
        terms: term -> weight; use `Regex.value` and `Regex.word`, and `+`, `*` and `star`.
    """

    def __init__(self, semiring: Semiring, terms: "Mapping[_Atom, Any]") -> None:
        self.semiring = semiring
        self.terms = {term: weight for term, weight in terms.items() if weight != semiring.zero}
        self._hash = hash(frozenset(self.terms.items()))
        self._known: dict[Hashable, Regex] = {}

    @classmethod
    def value(cls, semiring: Semiring, value: Any) -> "Regex":
        """Return the expression with `value` at the empty word and zero elsewhere."""
        return cls(semiring, {_EPSILON: value})

    @classmethod
    def word(cls, semiring: Semiring, word: Iterable[Hashable]) -> "Regex":
        """Return the expression with one at `word` and zero elsewhere."""
        one = cls.value(semiring, semiring.one)
        return reduce(lambda p, symbol: p * cls(semiring, {_Symbol(symbol): semiring.one}), word, one)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Regex) and self._hash == other._hash and self.terms == other.terms
        )

    def __str__(self) -> str:
        one = self.semiring.one
        terms = [f"{term}" if weight == one else f"{weight}·{term}" for term, weight in self.terms.items()]
        return terms[0] if len(terms) == 1 else f"({' + '.join(terms)})" if terms else "∅"

    @cached_property
    def at_empty(self) -> Any:
        """The value at the empty word."""
        s = self.semiring
        values = (s.multiply(weight, term.at_empty(s)) for term, weight in self.terms.items())
        return reduce(s.add, values, s.zero)

    def derivative(self, symbol: Hashable) -> "Regex":
        """Return the expression of what follows `symbol`."""
        if symbol not in self._known:
            s = self.semiring
            parts = (term.derivative(s, symbol).scale(weight) for term, weight in self.terms.items())
            self._known[symbol] = reduce(Regex.__add__, parts, Regex(s, {}))
        return self._known[symbol]

    def scale(self, value: Any) -> "Regex":
        """Return the expression with all values multiplied by `value` from the left."""
        if value == self.semiring.one:
            return self
        multiply = self.semiring.multiply
        return Regex(self.semiring, {term: multiply(value, weight) for term, weight in self.terms.items()})

    def __add__(self, other: "Regex") -> "Regex":
        terms = dict(self.terms)
        for term, weight in other.terms.items():
            terms[term] = self.semiring.add(terms[term], weight) if term in terms else weight
        return Regex(self.semiring, terms)

    def __mul__(self, other: "Regex") -> "Regex":
        s = self.semiring
        if not self.terms or not other.terms:
            return Regex(s, {})
        if self.terms.keys() == {_EPSILON}:
            return other.scale(self.terms[_EPSILON])
        if other.terms == {_EPSILON: s.one}:
            return self
        return Regex(s, {_Product(self, other): s.one})

    def star(self) -> "Regex":
        """Return the sum of all powers."""
        s = self.semiring
        if self.terms.keys() <= {_EPSILON}:
            return Regex.value(s, s.star(self.at_empty))
        return Regex(s, {_Star(self): s.one})


def regular_expressions(semiring: Semiring) -> Semiring:
    """Return the semiring whose values are regular expressions over `semiring`."""
    return Semiring(
        f"regular expressions over {semiring}",
        Regex(semiring, {}),
        Regex.value(semiring, semiring.one),
        Regex.__add__,
        Regex.__mul__,
        Regex.star,
    )
