"""Semirings: what the values of a convolution are added and multiplied by.

Paper: Elliott, Generalized Convolution and Efficient Language Recognition, https://arxiv.org/abs/1903.10677.
"""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["BOOLEAN", "COUNTING", "MAX_PLUS", "MIN_PLUS", "PROBABILITY", "REAL", "Semiring"]


@dataclass(frozen=True)
class Semiring:
    r"""Two operations, of which the second distributes over the first.

    Attributes:
        name: what it is called.
        zero: neutral for `add`; absorbs under `multiply`.
        one: neutral for `multiply`.
        add: associative and commutative.
        multiply: associative.
        star: :math:`a^* = 1 + a a^*`, the sum of all powers.
        reduce: adds up the last axis of a tensor, where values may be elements of tensors.
    """

    name: str
    zero: Any
    one: Any
    add: Callable[[Any, Any], Any]
    multiply: Callable[[Any, Any], Any]
    star: Callable[[Any], Any]
    reduce: Callable[[Tensor], Tensor] | None = None

    def __repr__(self) -> str:
        return self.name


def _geometric(a: float) -> float:
    if not -1 < a < 1:
        raise ValueError(f"star of a real number must converge, so it must be between -1 and 1: got {a}")
    return 1 / (1 - a)


BOOLEAN = Semiring("boolean", False, True, operator.or_, operator.and_, lambda a: True, lambda t: t.any(-1))
"""Whether: languages as sets of words."""

COUNTING = Semiring(
    "counting", 0, 1, operator.add, operator.mul, lambda a: math.inf if a else 1, lambda t: t.sum(-1)
)
"""In how many ways."""

REAL = Semiring("real", 0.0, 1.0, operator.add, operator.mul, _geometric, lambda t: t.sum(-1))
"""Polynomials, signals and images."""

PROBABILITY = Semiring(
    "probability", 0.0, 1.0, operator.add, operator.mul, lambda a: 1 / (1 - a) if a < 1 else math.inf,
    lambda t: t.sum(-1),
)  # fmt: skip
"""How likely; numbers are not negative."""

MIN_PLUS = Semiring(
    "min-plus", math.inf, 0.0, min, operator.add, lambda a: 0.0 if a >= 0 else -math.inf,
    lambda t: t.amin(-1),
)  # fmt: skip
"""At what least cost."""

MAX_PLUS = Semiring(
    "max-plus", -math.inf, 0.0, max, operator.add, lambda a: 0.0 if a <= 0 else math.inf,
    lambda t: t.amax(-1),
)  # fmt: skip
"""With what greatest score."""
