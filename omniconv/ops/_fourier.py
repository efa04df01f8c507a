r"""Discrete Fourier transforms of real numbers, written out without loops for every length.

Every number is a vector here, one lane a channel, so that a transform needs no shuffles. It is first carried out on
names: the Cooley-Tukey decomposition of n = r m,

    X[k + m q] = sum over j < r of  exp(-2 pi i j q / r)  exp(-2 pi i j k / n)  X_j[k],

where X_j is the transform of every r-th number from j on, writes down additions and multiplications by constants, each
once. What is zero, one or another's negative is never written; the transform of real numbers repeats itself,
X[n - k] = conj X[k], so its second half is never written either. Then LLVM makes a function of what was written.
"""

import math
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from llvmlite import ir
from numba import cfunc, types

from omniconv.ops._simd import INT, TYPES, VECTOR, call, lanes, load_vector, make_intrinsic, store_vector

__all__ = [
    "PAIR",
    "call_transform",
    "inverse",
    "inverse_program",
    "smooth_length",
    "transform",
    "transform_program",
]

PAIR = 2 * VECTOR
"""Bytes of a complex vector: real parts, then imaginary ones."""

call_transform: Any = call(3)
"""Call what `transform` or `inverse` returned, given its address and its arguments."""

Complex = tuple[int, int]


def _cosine(k: int, n: int) -> float:
    """Return cos(2 pi k / n), exactly where it is 0, 1/2 or 1, and the same number wherever it is the same."""
    k = min(k % n, -k % n)
    if 4 * k > n:
        return -_cosine(n - 2 * k, 2 * n)
    if 12 * k in (0, 2 * n, 3 * n):
        return {0: 1.0, 2 * n: 0.5, 3 * n: 0.0}[12 * k]
    common = math.gcd(k, n)
    return math.cos(2 * math.pi * (k // common) / (n // common))


def _sine(k: int, n: int) -> float:
    return _cosine(4 * k - n, 4 * n)


def _radix(n: int) -> int:
    """Return the factor to split off next."""
    return next(r for r in (4, *range(2, n + 1)) if n % r == 0)


@dataclass
class _Program:
    """Additions, subtractions and multiplications by constants, each once.

    A number is named by the step that computes it, counted from 1; -i is the negative of step i, and 0 is zero.
    """

    steps: list[tuple[str, Any, int]] = field(default_factory=list)
    known: dict[tuple[str, Any, int], int] = field(default_factory=dict)

    def write(self, operation: str, a: Any, b: int) -> int:
        key = operation, a, b
        if key not in self.known:
            self.steps.append(key)
            self.known[key] = len(self.steps)
        return self.known[key]

    def add(self, a: int, b: int) -> int:
        if a == 0 or b == 0:
            return a or b
        if a == -b:
            return 0
        if a < 0 and b < 0:
            return -self.add(-a, -b)
        a, b = max(a, b), min(a, b)
        if b > 0:
            return self.write("add", a, b)
        return self.write("sub", a, -b) if a > -b else -self.write("sub", -b, a)

    def times(self, factor: float, a: int) -> int:
        if factor == 0 or a == 0:
            return 0
        if factor < 0:
            return -self.times(-factor, a)
        if a < 0:
            return -self.times(factor, -a)
        return a if factor == 1 else self.write("mul", factor, a)

    def turn(self, a: Complex, k: int, n: int) -> Complex:
        """Return a exp(-2 pi i k / n)."""
        c, s = _cosine(k, n), _sine(k, n)
        return (
            self.add(self.times(c, a[0]), self.times(s, a[1])),
            self.add(self.times(c, a[1]), self.times(-s, a[0])),
        )

    def sum(self, terms: list[int]) -> int:
        total = 0
        for term in terms:
            total = self.add(total, term)
        return total

    def small(self, x: list[Complex]) -> list[Complex]:
        """Return the transform of a few complex numbers: 4, or as many as a prime."""
        n = len(x)
        if n == 4:
            even, odd = self.small(x[::2]), self.small(x[1::2])
            turned = [odd[0], self.turn(odd[1], 1, 4)]
            lower = [self.both(e, o) for e, o in zip(even, turned, strict=True)]
            upper = [self.both(e, (-o[0], -o[1])) for e, o in zip(even, turned, strict=True)]
            return [*lower, *upper]
        # Numbers j and n - j meet the same cosines and opposite sines.
        half = range(1, (n + 1) // 2)
        sums = [self.both(x[j], x[n - j]) for j in half]
        gaps = [self.both(x[j], (-x[n - j][0], -x[n - j][1])) for j in half]
        middle = [x[n // 2]] if n % 2 == 0 else []
        found: list[Complex] = []
        for k in range(n):
            parts = []
            for part in (0, 1):
                terms = [x[0][part]] + [(-1) ** k * m[part] for m in middle]
                terms += [self.times(_cosine(j * k, n), s[part]) for j, s in zip(half, sums, strict=True)]
                other = self.sum(
                    [self.times(_sine(j * k, n), g[1 - part]) for j, g in zip(half, gaps, strict=True)]
                )
                parts.append(self.add(self.sum(terms), other if part == 0 else -other))
            found.append((parts[0], parts[1]))
        return found

    def both(self, a: Complex, b: Complex) -> Complex:
        return self.add(a[0], b[0]), self.add(a[1], b[1])

    def forward(self, x: list[int]) -> list[Complex]:
        """Return the transform of real numbers."""
        n = len(x)
        if n == 1:
            return [(x[0], 0)]
        r = _radix(n)
        m = n // r
        parts = [self.forward(x[j::r]) for j in range(r)]
        found: list[Complex] = [(0, 0)] * n
        for k in range(m // 2 + 1):
            terms = [self.turn(part[k], j * k, n) for j, part in enumerate(parts)]
            for q, value in enumerate(self.small(terms)):
                found[k + m * q] = value
        for k in range(m // 2 + 1, m):
            for q in range(r):
                re, im = found[n - k - m * q]
                found[k + m * q] = re, -im
        return found

    def backward(self, x: list[Complex]) -> list[int]:
        """Return n times the real numbers whose transform is given: the steps of `forward` from last to first."""
        n = len(x)
        if n == 1:
            return [x[0][0]]
        r = _radix(n)
        m = n // r
        parts: list[list[Complex]] = [[(0, 0)] * m for _ in range(r)]
        for k in range(m // 2 + 1):
            # With real and imaginary parts exchanged, the transform is the inverse one, exchanged.
            group = self.small([(x[k + m * q][1], x[k + m * q][0]) for q in range(r)])
            for j, (im, re) in enumerate(group):
                value = self.turn((re, im), -j * k, n)
                if 2 * k % m == 0:
                    parts[j][k] = value[0], 0
                else:
                    parts[j][k], parts[j][m - k] = value, (value[0], -value[1])
        found = [0] * n
        for j, part in enumerate(parts):
            found[j::r] = self.backward(part)
        return found

    def needed(self, numbers: list[int]) -> list[int]:
        """Return the steps without which some of the numbers could not be computed, in order."""
        found, queue = set(), [abs(number) for number in numbers if number]
        while queue:
            if (number := queue.pop()) not in found:
                found.add(number)
                operation, a, b = self.steps[number - 1]
                queue += {"in": [], "mul": [b]}.get(operation, [a, b])
        return sorted(found)

    def emit(self, builder: Any, type: Any, address: Any, outputs: dict[Any, int]) -> None:
        """Emit the steps that outputs need.

        Args:
            builder: LLVM's.
            type: of vectors.
            address: of what lies in a place; inputs name theirs.
            outputs: the number that goes to a place.
        """
        places: dict[int, list[Any]] = {}
        for place, number in outputs.items():
            places.setdefault(abs(number), []).append(place)
        # LLVM may make one instruction of a multiplication and an addition.
        fused = ("contract",)
        values: dict[int, Any] = {0: ir.Constant(type, None)}
        for number in [0, *self.needed(list(outputs.values()))]:
            if number:
                operation, a, b = self.steps[number - 1]
                if operation == "in":
                    values[number] = load_vector(builder, address(a), type)
                elif operation == "mul":
                    constant = ir.Constant(type, [a] * type.count)
                    values[number] = builder.fmul(values[b], constant, flags=fused)
                else:
                    two = {"add": builder.fadd, "sub": builder.fsub}[operation]
                    values[number] = two(values[a], values[b], flags=fused)
            for place in places.get(number, []):
                value = values[number]
                store_vector(builder, builder.fneg(value) if outputs[place] < 0 else value, address(place))


def transform_program(length: int) -> tuple[_Program, dict[Any, int]]:
    """Return the steps from so many real numbers to their spectrum, and where its parts are found.

    Number t has the place t, and the real and imaginary part of frequency k have (k, 0) and (k, 1).
    """
    program = _Program()
    found = program.forward([program.write("in", t, 0) for t in range(length)])
    return program, {(k, of): found[k][of] for k in range(length // 2 + 1) for of in (0, 1)}


def inverse_program(length: int) -> tuple[_Program, dict[Any, int]]:
    """Return the steps back."""
    program = _Program()
    half = [
        # The imaginary parts of the lowest and of the highest frequency are zero and not read.
        (program.write("in", (k, 0), 0), program.write("in", (k, 1), 0) if 2 * k % length else 0)
        for k in range(length // 2 + 1)
    ]
    whole = half + [(half[length - k][0], -half[length - k][1]) for k in range(length // 2 + 1, length)]
    return program, {t: program.times(1 / length, x) for t, x in enumerate(program.backward(whole))}


def _compiled(dtype: torch.dtype, program: _Program, outputs: dict[Any, int]) -> Any:
    vector = ir.VectorType(TYPES[dtype][1], lanes(dtype))

    def body(builder: Any, args: Any) -> None:
        numbers, spectrum, step = args

        def address(place: Any) -> Any:
            if isinstance(place, int):
                return builder.add(numbers, ir.Constant(INT, VECTOR * place))
            k, of = place
            frequency = builder.add(spectrum, builder.mul(step, ir.Constant(INT, k)))
            return builder.add(frequency, ir.Constant(INT, VECTOR * of))

        program.emit(builder, vector, address, outputs)

    run = make_intrinsic(3, body)

    @cfunc(types.void(types.int64, types.int64, types.int64))
    def transforms(numbers, spectrum, step):
        run(numbers, spectrum, step)

    return transforms


@cache
def transform(dtype: torch.dtype, length: int) -> Any:
    r"""Return the compiled `transform(numbers, spectrum, step)` of real numbers.

    .. math:: X_k = \sum_t x_t \, e^{-2 \pi i k t / n}, \qquad k \le n / 2

    Args:
        dtype: what is computed in, float32 or float64.
        length: n; the vectors x lie side by side, complex vectors X `step` bytes apart.
    """
    return _compiled(dtype, *transform_program(length))


@cache
def inverse(dtype: torch.dtype, length: int) -> Any:
    """Return the compiled `inverse(numbers, spectrum, step)`, the inverse of `transform`.

    Args:
        dtype: what is computed in, float32 or float64.
        length: of the real numbers.
    """
    return _compiled(dtype, *inverse_program(length))


@cache
def smooth_length(least: int) -> int:
    """Return the next length that is quick to transform: a multiple of 4 if it is not small, of small factors."""
    length = least
    while True:
        rest = length
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1 and (length % 4 == 0 or length < 16):
            return length
        length += 1
