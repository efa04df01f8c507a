"""Formulas in plain Python turned into compiled functions: run once on values that note what is done with them.

What comes out is straight arithmetic without branches or calls, which LLVM turns into vector instructions inside a
loop over arrays; it cannot do that with calls of the C library, so log and exp are spelled out too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from omniconv.ops.log_bessel._formulas import horner

_DOUBLE: Any = ir.DoubleType()
_INT: Any = ir.IntType(64)
# Products of the upper part with a small integer are exact.
_LN2 = (0.6931471803691238, 1.9082149292705877e-10)
# The bits of the root of 1/2, from which mantissas are counted.
_HALF_ROOT = 0x3FE6A09E667F3BCD
_ATANH = [2 / (2 * k + 3) for k in range(10)]
_EXP = [1 / math.factorial(k) for k in range(14)]


class Value:
    """A number of the compiled function."""

    def __init__(self, builder: Any, value: Any) -> None:
        self.builder, self.value = builder, value

    def _of(self, other: Any) -> Any:
        return other.value if isinstance(other, Value) else ir.Constant(_DOUBLE, float(other))

    def _make(self, name: str, a: Any, b: Any) -> Value:
        # Contracted, a product and a sum become one instruction.
        return Value(self.builder, getattr(self.builder, name)(a, b, flags=["contract"]))

    def __add__(self, other: Any) -> Value:
        return self._make("fadd", self.value, self._of(other))

    def __sub__(self, other: Any) -> Value:
        return self._make("fsub", self.value, self._of(other))

    def __rsub__(self, other: Any) -> Value:
        return self._make("fsub", self._of(other), self.value)

    def __mul__(self, other: Any) -> Value:
        return self._make("fmul", self.value, self._of(other))

    def __truediv__(self, other: Any) -> Value:
        return self._make("fdiv", self.value, self._of(other))

    def __rtruediv__(self, other: Any) -> Value:
        return self._make("fdiv", self._of(other), self.value)

    def __neg__(self) -> Value:
        return -0.0 - self

    def __lt__(self, other: Any) -> Any:
        return self.builder.fcmp_ordered("<", self.value, self._of(other))

    def __gt__(self, other: Any) -> Any:
        return self.builder.fcmp_ordered(">", self.value, self._of(other))

    __radd__, __rmul__ = __add__, __mul__


class Functions:
    """The elementary functions of `Value`."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def _intrinsic(self, name: str, x: Value) -> Value:
        function = self.builder.module.declare_intrinsic(f"llvm.{name}", [_DOUBLE])
        return Value(self.builder, self.builder.call(function, [x.value]))

    def sqrt(self, x: Value) -> Value:
        return self._intrinsic("sqrt", x)

    def floor(self, x: Value) -> Value:
        return self._intrinsic("floor", x)

    def half(self, x: Value) -> Value:
        b = self.builder
        return Value(b, b.fpext(b.fptrunc(x.value, ir.FloatType()), _DOUBLE))

    def where(self, condition: Any, a: Any, b: Any) -> Any:
        a, b = (t.value if isinstance(t, Value) else ir.Constant(_DOUBLE, float(t)) for t in (a, b))
        return Value(self.builder, self.builder.select(condition, a, b))

    def log(self, x: Value) -> Value:
        """Nonsense where x is not positive and normal."""
        b = self.builder
        bits = b.bitcast(x.value, _INT)
        power = b.ashr(b.sub(bits, ir.Constant(_INT, _HALF_ROOT)), ir.Constant(_INT, 52))
        mantissa = b.bitcast(b.sub(bits, b.shl(power, ir.Constant(_INT, 52))), _DOUBLE)
        n, f = Value(b, b.sitofp(power, _DOUBLE)), Value(b, mantissa) - 1.0
        # log(1 + f) = 2 atanh(g) with f - f g = 2 g.
        g = f / (2.0 + f)
        square = g * g
        return n * _LN2[0] + (f - (g * (f - square * horner(_ATANH, square)) - n * _LN2[1]))

    def log1p(self, x: Value) -> Value:
        """Nonsense where 1 + x is not positive and normal."""
        y = 1.0 + x
        # What y has lost by rounding counts where it is near 1.
        return self.log(y) + self.where(x < 1.0, x - (y - 1.0), 0.0)

    def exp(self, x: Value) -> Value:
        """Nonsense where e^x is not normal."""
        b = self.builder
        n = self.floor(x * (1 / math.log(2)) + 0.5)
        power = b.shl(b.add(b.fptosi(n.value, _INT), ir.Constant(_INT, 1023)), ir.Constant(_INT, 52))
        return horner(_EXP, (x - n * _LN2[0]) - n * _LN2[1]) * Value(b, b.bitcast(power, _DOUBLE))


class Dual:
    """A value with its derivatives by v and x; None for one that is zero."""

    def __init__(self, value: Any, parts: tuple[Any, Any]) -> None:
        self.value, self.parts = value, parts

    def chain(self, value: Any, slope: Any) -> Dual:
        """Return a function's value, given its derivative by this number."""
        return Dual(value, tuple(None if p is None else p * slope for p in self.parts))  # type: ignore[arg-type]

    def __add__(self, other: Any) -> Dual:
        other = _dual(other)
        parts = zip(self.parts, other.parts, strict=True)
        return Dual(
            self.value + other.value, tuple(b if a is None else a if b is None else a + b for a, b in parts)
        )  # type: ignore[arg-type]

    def __mul__(self, other: Any) -> Dual:
        other = _dual(other)
        value = self.value * other.value
        return Dual(value, (self.chain(value, other.value) + other.chain(value, self.value)).parts)

    def __neg__(self) -> Dual:
        return self.chain(-self.value, -1.0)

    def __sub__(self, other: Any) -> Dual:
        return Dual(self.value - _dual(other).value, (self + -_dual(other)).parts)

    def __rsub__(self, other: Any) -> Dual:
        return _dual(other) - self

    def __truediv__(self, other: Any) -> Dual:
        other = _dual(other)
        value, inverse = self.value / other.value, 1.0 / other.value
        return Dual(value, (self.chain(value, inverse) + other.chain(value, -value * inverse)).parts)

    def __rtruediv__(self, other: Any) -> Dual:
        return _dual(other) / self

    def __lt__(self, other: Any) -> Any:
        return self.value < _dual(other).value

    def __gt__(self, other: Any) -> Any:
        return self.value > _dual(other).value

    __radd__, __rmul__ = __add__, __mul__


def _dual(x: Any) -> Dual:
    return x if isinstance(x, Dual) else Dual(x, (None, None))


class DualFunctions:
    """The elementary functions of `Dual`, given those of its values."""

    def __init__(self, functions: Any) -> None:
        self.of = functions

    def sqrt(self, x: Dual) -> Dual:
        root = self.of.sqrt(x.value)
        return x.chain(root, 0.5 / root)

    def log(self, x: Dual) -> Dual:
        return x.chain(self.of.log(x.value), 1.0 / x.value)

    def log1p(self, x: Dual) -> Dual:
        return x.chain(self.of.log1p(x.value), 1.0 / (1.0 + x.value))

    def exp(self, x: Dual) -> Dual:
        value = self.of.exp(x.value)
        return x.chain(value, value)

    def floor(self, x: Dual) -> Dual:
        return _dual(self.of.floor(x.value))

    def half(self, x: Dual) -> Dual:
        return _dual(self.of.half(x.value))

    def where(self, condition: Any, a: Any, b: Any) -> Dual:
        a, b = _dual(a), _dual(b)
        parts = [
            None
            if p is q is None
            else self.of.where(condition, 0.0 if p is None else p, 0.0 if q is None else q)
            for p, q in zip(a.parts, b.parts, strict=True)
        ]
        return Dual(self.of.where(condition, a.value, b.value), tuple(parts))  # type: ignore[arg-type]


def compiled(formula: Callable[[Any, Any, Any], Any]) -> Any:
    """Return the compiled function `f(v, x)` of `formula(m, v, x)`."""

    def emit(typing, v, x):
        def codegen(context, builder, signature, args):
            return formula(Functions(builder), *(Value(builder, a) for a in args)).value

        return types.float64(types.float64, types.float64), codegen

    return intrinsic(emit)


def compiled_gradient(formula: Callable[[Any, Any, Any], Any]) -> Any:
    """Return the compiled function `g(v, x)` that gives the derivatives of `formula(m, v, x)` by v and x."""

    def emit(typing, v, x):
        pair = types.UniTuple(types.float64, 2)

        def codegen(context, builder, signature, args):
            v, x = (Value(builder, a) for a in args)
            result = formula(DualFunctions(Functions(builder)), Dual(v, (1.0, None)), Dual(x, (None, 1.0)))
            parts = [(Value(builder, ir.Constant(_DOUBLE, 0.0)) + p).value for p in result.parts]
            return context.make_tuple(builder, pair, parts)

        return pair(types.float64, types.float64), codegen

    return intrinsic(emit)
