"""Compiled log I and log K: a block of elements is sorted by region, then each region is one straight loop."""

import numba
import numpy as np

from omniconv.ops.log_bessel import _formulas
from omniconv.ops.log_bessel._coefficients import (
    FAR,
    FARTHER,
    FEW,
    LONG,
    NEAR_ROOT,
    ROOT,
    SHORT,
    SPLIT,
    TEMME,
    TEMME_TINY,
    TERMS,
    TINY,
)
from omniconv.ops.log_bessel._emit import compiled, compiled_gradient

BLOCK = 1024
"""Elements that are sorted together; their arrays stay in the first cache."""
LOW = 2.5
"""Orders below it are few steps above those where K's recurrence starts."""
VECTOR = 16
"""Elements that a loop takes at a time, or a multiple of that."""
OUTSIDE = 7
"""The region without a formula, outside the domain."""


def _far(second, terms, exponent=_formulas.exponent):
    return lambda m, v, x: _formulas.far(m, v, x, exponent(m, v, x), second, terms)


def _near(steps, terms):
    return lambda m, v, x: _formulas.second_near(m, v, x, int(steps), terms)


FIRST = (
    _far(False, FEW),
    _far(False, TERMS),
    _far(False, TERMS, _formulas.exponent_near_root),
    lambda m, v, x: _formulas.first(m, v, x, LONG),
    lambda m, v, x: _formulas.first(m, v, x, SHORT),
)
SECOND = (
    _far(True, FEW),
    _far(True, TERMS),
    _far(True, TERMS, _formulas.exponent_near_root),
    _formulas.second,
    _near(FAR, TEMME),
    _near(LOW, TEMME),
    _near(LOW, TEMME_TINY),
)

# Without a sign, an index needs no check for counting from the end.
_ONE = np.uint64(1)

_jit = numba.njit(nogil=True, error_model="numpy")


def _value_loop(formula):
    f = compiled(formula)

    @_jit
    def loop(region, v, x, out):
        for j in range(v.size):
            out[0, j] = f(v[j], x[j])

    return loop


def _gradient_loop(formula):
    f = compiled_gradient(formula)

    @_jit
    def loop(region, v, x, out):
        for j in range(v.size):
            out[0, j], out[1, j] = f(v[j], x[j])

    return loop


def _choose(loops):
    """Return a function that calls the loop of a region."""
    loop, *others = loops
    if not others:
        return loop
    following = _choose(others)

    @_jit
    def choose(region, v, x, out):
        if region == 0:
            loop(region, v, x, out)
        else:
            following(region - 1, v, x, out)

    return choose


_first, _second = (_choose([_value_loop(f) for f in formulas]) for formulas in (FIRST, SECOND))
_first_gradient, _second_gradient = (
    _choose([_gradient_loop(f) for f in formulas]) for formulas in (FIRST, SECOND)
)


@_jit
def _locate(v, x, regions):
    """Write the place of every element's formula in `SECOND`, where those of `FIRST` end sooner."""
    for j in range(v.size):
        a, b = v[j], x[j]
        square = a * a + b * b
        close = square < FAR * FAR
        near = close & (b < SPLIT)
        low = near & (a < LOW)
        tiny = low & (b < TINY)
        root = (square >= FAR * FAR) & (abs(b - ROOT[0] * a) < NEAR_ROOT * a)
        region = 3 * close + near + low + tiny if close else 1 * (square < FARTHER * FARTHER)
        region = 2 if root else region
        regions[j] = region if (a >= 0.0) & (b > 0.0) & (square < np.inf) else OUTSIDE


@_jit
def _sort(v, x, regions, count, chosen, vs, xs):
    """Bring the elements of every region together and note where they come from."""
    count[:] = 0
    for j in range(v.size):
        region = regions[j]
        place = count[region]
        chosen[region, place] = j
        vs[region, place] = v[j]
        xs[region, place] = x[j]
        count[region] = place + _ONE


@numba.njit(nogil=True, cache=True, error_model="numpy")
def log_bessel(begin, end, v, x, out, second):
    """Write logarithms or derivatives of elements `begin` to `end`.

    Args:
        begin: first element.
        end: beyond the last.
        v: orders (N).
        x: arguments (N).
        out: log I or log K (1, N), or its derivatives by v and x (2, N).
        second: whether K.
    """
    regions, count = np.empty(BLOCK, np.uint64), np.empty(OUTSIDE + 1, np.uint64)
    chosen = np.empty((OUTSIDE + 1, BLOCK), np.uint64)
    vs, xs = np.empty((OUTSIDE + 1, BLOCK)), np.empty((OUTSIDE + 1, BLOCK))
    found = np.empty((2, BLOCK))
    for start in range(begin, end, BLOCK):
        stop = min(start + BLOCK, end)
        _locate(v[start:stop], x[start:stop], regions)
        _sort(v[start:stop], x[start:stop], regions, count, chosen, vs, xs)
        for region in range(OUTSIDE + 1):
            n = np.int64(count[region])
            if n == 0:
                continue
            # Up to whole vectors, with what does no harm.
            whole = (n + VECTOR - 1) // VECTOR * VECTOR
            vs[region, n:whole], xs[region, n:whole] = vs[region, 0], xs[region, 0]
            a, b = vs[region, :whole], xs[region, :whole]
            if region == OUTSIDE:
                found[:, :n] = np.nan
            elif len(out) == 1:
                if second:
                    _second(region, a, b, found)
                else:
                    _first(region, a, b, found)
            elif second:
                _second_gradient(region, a, b, found)
            else:
                _first_gradient(region, a, b, found)
            for part in range(len(out)):
                for j in range(n):
                    out[part, np.uint64(start) + chosen[region, j]] = found[part, j]
