"""Explicit vectors for numba, and kernels on all cores: what the direct convolutions are written with.

A vector is 64 bytes: 16 numbers of float32 or 8 of float64, whatever registers the machine has; LLVM splits it
where they are narrower. Maps of bfloat16 and float16 are computed in float32. Addresses and strides are bytes.

Kernels run on torch's own OpenMP threads where torch has them, for a second pool of threads would fight with the
first over the cores, and else on Python threads.
"""

import ctypes
import os
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import cfunc, types
from numba.core import cgutils
from numba.extending import intrinsic

VECTOR = 64
"""Bytes of a vector."""

INT: Any = ir.IntType(64)
# llvmlite has no types that a checker could follow.
TYPES: dict[torch.dtype, tuple[Any, Any]] = {
    # How numbers are kept, and how they are computed with. LLVM's bfloat is missing from llvmlite.
    torch.float32: (ir.FloatType(), ir.FloatType()),
    torch.float64: (ir.DoubleType(), ir.DoubleType()),
    torch.float16: (ir.HalfType(), ir.FloatType()),
    torch.bfloat16: (ir.IntType(16), ir.FloatType()),
}


def lanes(dtype: torch.dtype) -> int:
    """Return how many numbers a vector of the type that `dtype` is computed in has."""
    return 8 if dtype == torch.float64 else 16


def _at(builder: Any, address: Any, type: Any) -> Any:
    return builder.inttoptr(address, type.as_pointer())


def load_vector(builder: Any, address: Any, type: Any) -> Any:
    return builder.load(_at(builder, address, type), align=1)


def store_vector(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, _at(builder, address, value.type), align=1)


def _like(type: Any, width: int) -> Any:
    return ir.VectorType(type, width) if width > 1 else type


def _constant(type: Any, value: float) -> Any:
    if isinstance(type, ir.VectorType):
        return ir.Constant(type, [value] * type.count)
    return ir.Constant(type, value)


def _widen(builder: Any, value: Any, dtype: torch.dtype, width: int) -> Any:
    """Convert numbers as they are kept into numbers to compute with."""
    if dtype == torch.float16:
        return builder.fpext(value, _like(ir.FloatType(), width))
    if dtype == torch.bfloat16:
        whole = _like(ir.IntType(32), width)
        bits = builder.shl(builder.zext(value, whole), _constant(whole, 16))
        return builder.bitcast(bits, _like(ir.FloatType(), width))
    return value


def _narrow(builder: Any, value: Any, dtype: torch.dtype, width: int) -> Any:
    """Convert back, rounding to nearest, ties to even."""
    if dtype == torch.float16:
        return builder.fptrunc(value, _like(ir.HalfType(), width))
    if dtype == torch.bfloat16:
        whole = _like(ir.IntType(32), width)
        bits = builder.bitcast(value, whole)
        upper = builder.lshr(bits, _constant(whole, 16))
        odd = builder.and_(upper, _constant(whole, 1))
        rounded = builder.lshr(
            builder.add(bits, builder.add(odd, _constant(whole, 0x7FFF))), _constant(whole, 16)
        )
        # Rounding up could make an infinity of a NaN; one of its upper bits stays set instead.
        quiet = builder.or_(upper, _constant(whole, 0x40))
        isnan = builder.fcmp_unordered("uno", value, value)
        return builder.trunc(builder.select(isnan, quiet, rounded), _like(ir.IntType(16), width))
    return value


def make_intrinsic(count: int, body: Callable[[Any, Any], None]) -> Any:
    """Make an intrinsic of `count` int64 arguments from a function that emits its code."""
    parameters = ", ".join(f"a{index}" for index in range(count))
    scope: dict[str, Any] = {"body": body, "types": types}
    # numba reads the number of arguments off the signature.
    exec(
        f"def emit(typing, {parameters}):\n"
        "    def codegen(context, builder, signature, args):\n"
        "        body(builder, args)\n"
        "        return context.get_dummy_value()\n"
        f"    return types.void(*[types.int64] * {count}), codegen\n",
        scope,
    )
    return intrinsic(scope["emit"])


@cache
def clear(dtype: torch.dtype) -> Any:
    """Return `clear(address)`: one vector of zeros."""
    vector = ir.VectorType(TYPES[dtype][1], lanes(dtype))
    return make_intrinsic(1, lambda builder, args: store_vector(builder, ir.Constant(vector, None), args[0]))


@cache
def copy(dtype: torch.dtype) -> Any:
    """Return `copy(to, from)`: one vector."""
    vector = ir.VectorType(TYPES[dtype][1], lanes(dtype))
    return make_intrinsic(
        2, lambda builder, args: store_vector(builder, load_vector(builder, args[1], vector), args[0])
    )


def _some(builder: Any, count: Any, width: int) -> Any:
    """Return a mask of the first `count` of `width` numbers."""
    whole = ir.VectorType(INT, width)
    one = builder.insert_element(ir.Constant(whole, ir.Undefined), count, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), width), [0] * width)
    all_of_them = builder.shuffle_vector(one, one, zeros)
    return builder.icmp_signed("<", ir.Constant(whole, list(range(width))), all_of_them)


def _load_some(builder: Any, address: Any, type: Any, mask: Any) -> Any:
    """Load the numbers of a vector that the mask names, and zeros for the others, whose memory is not touched."""
    parameters = [type.as_pointer(), ir.IntType(32), mask.type, type]
    name = f"llvm.masked.load.v{type.count}{_suffix(type)}.p0"
    load = cgutils.get_or_insert_function(builder.module, ir.FunctionType(type, parameters), name)
    aligned = ir.Constant(ir.IntType(32), 1)
    return builder.call(load, [_at(builder, address, type), aligned, mask, ir.Constant(type, None)])


def _store_some(builder: Any, value: Any, address: Any, mask: Any) -> None:
    type = value.type
    parameters = [type, type.as_pointer(), ir.IntType(32), mask.type]
    name = f"llvm.masked.store.v{type.count}{_suffix(type)}.p0"
    store = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), parameters), name)
    aligned = ir.Constant(ir.IntType(32), 1)
    builder.call(store, [value, _at(builder, address, type), aligned, mask])


def _suffix(type: Any) -> str:
    """Return what LLVM's names of intrinsics call the numbers of a vector."""
    names = {"half": "f16", "float": "f32", "double": "f64"}
    return names.get(str(type.element), str(type.element))


@cache
def move(dtype: torch.dtype, *, load: bool, width: int) -> Any:
    """Return `move(to, from, count)`: copy numbers between maps and vectors, converting between their types.

    Args:
        dtype: of the maps.
        load: from the maps into vectors, or back.
        width: 1, or all lanes, of which the first `count` are in the map.
    """
    kept, computed = (_like(type, width) for type in TYPES[dtype])

    def body(builder: Any, args: Any) -> None:
        to, source, count = args
        if width == 1:
            if load:
                store_vector(builder, _widen(builder, load_vector(builder, source, kept), dtype, width), to)
            else:
                store_vector(
                    builder, _narrow(builder, load_vector(builder, source, computed), dtype, width), to
                )
            return
        mask = _some(builder, count, width)
        if load:
            store_vector(builder, _widen(builder, _load_some(builder, source, kept, mask), dtype, width), to)
        else:
            _store_some(
                builder, _narrow(builder, load_vector(builder, source, computed), dtype, width), to, mask
            )

    return make_intrinsic(3, body)


@cache
def transpose(dtype: torch.dtype, *, load: bool) -> Any:
    """Return the compiled `transpose(vectors, spacing, map, row, pixels, channels)`: a square of a channels-first map.

    `channels` rows of `pixels` numbers, `row` bytes apart, become one vector of all channels for every pixel,
    `spacing` bytes apart, or the other way round; both at most as many as a vector has lanes.

    Args:
        dtype: of the map.
        load: from the map into vectors, or back.
    """
    width = lanes(dtype)
    kept, computed = (ir.VectorType(type, width) for type in TYPES[dtype])

    def exchange(builder: Any, rows: list[Any]) -> list[Any]:
        # Exchange blocks off the diagonal, of half the size every time.
        half = width // 2
        while half:
            upper = [i for i in range(width) if not i & half]
            low = [i if not i & half else width + i - half for i in range(width)]
            high = [i + half if not i & half else width + i for i in range(width)]
            for i in upper:
                a, b = rows[i], rows[i + half]
                for place, order in ((i, low), (i + half, high)):
                    mask = ir.Constant(ir.VectorType(ir.IntType(32), width), order)
                    rows[place] = builder.shuffle_vector(a, b, mask)
            half //= 2
        return rows

    def body(builder: Any, args: Any) -> None:
        vectors, spacing, map, row, pixels, channels = args
        mask = _some(builder, pixels, width)
        none = ir.Constant(mask.type, None)

        def address(start: Any, step: Any, index: int) -> Any:
            return builder.add(start, builder.mul(step, ir.Constant(INT, index)))

        def inside(index: int, count: Any) -> Any:
            return builder.icmp_signed("<", ir.Constant(INT, index), count)

        if load:
            rows = []
            for channel in range(width):
                taken = builder.select(inside(channel, channels), mask, none)
                value = _load_some(builder, address(map, row, channel), kept, taken)
                rows.append(_widen(builder, value, dtype, width))
            for pixel, value in enumerate(exchange(builder, rows)):
                with builder.if_then(inside(pixel, pixels), likely=True):
                    store_vector(builder, value, address(vectors, spacing, pixel))
            return
        columns = []
        for pixel in range(width):
            # Beyond the last pixel the first one stands in, so that nothing else is read.
            index = builder.select(inside(pixel, pixels), ir.Constant(INT, pixel), ir.Constant(INT, 0))
            columns.append(load_vector(builder, builder.add(vectors, builder.mul(spacing, index)), computed))
        for channel, value in enumerate(exchange(builder, columns)):
            with builder.if_then(inside(channel, channels), likely=True):
                narrow = _narrow(builder, value, dtype, width)
                _store_some(builder, narrow, address(map, row, channel), mask)

    run = make_intrinsic(6, body)

    @cfunc(types.void(*[types.int64] * 6))
    def turn(vectors, spacing, map, row, pixels, channels):
        run(vectors, spacing, map, row, pixels, channels)

    return turn


_LOOPS = 13
"""How many arguments the innermost loops take."""


@cache
def accumulate(dtype: torch.dtype, count: int, spacing: int, *, keep: bool) -> Any:
    r"""Return the compiled innermost loops of the direct convolutions, to be called with `call_accumulate`.

    `(sums, start, a, b, n0, a0, b0, n1, a1, b1, n2, a2, b2)` computes `count` vectors that lie side by side

    .. math:: \mathrm{sums}_k = \mathrm{start} + \sum_{i,j,l} a_{i,j,l,k} \, b_{i,j,l}

    where a moves by a0, a1 and a2 bytes with i < n0, j < n1 and l < n2, and by `spacing` with k, and b by b0, b1
    and b2. The sums stay in registers all the while: forwards they are neighbouring pixels, a the maps and b the
    kernel; for the kernel's gradient they are neighbouring taps and b the gradient of the output.

    It is compiled by itself, for every `count` and `spacing` in a moment, so that the kernels around it are compiled
    once.

    Args:
        dtype: what is computed in, float32 or float64.
        count: sums, at most as many as there are registers.
        spacing: bytes.
        keep: whether the sums go on from what is in memory; `start` is not read then.
    """
    vector = ir.VectorType(TYPES[dtype][1], lanes(dtype))
    name = f"llvm.fma.v{lanes(dtype)}f{512 // lanes(dtype)}"

    def body(builder: Any, args: Any) -> None:
        fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector] * 3), name)
        sums, start, a, b, *loops = args
        registers = [cgutils.alloca_once(builder, vector) for _ in range(count)]
        places = [builder.add(sums, ir.Constant(INT, VECTOR * k)) for k in range(count)]
        first = None if keep else load_vector(builder, start, vector)
        for register, place in zip(registers, places, strict=True):
            builder.store(load_vector(builder, place, vector) if first is None else first, register)

        def nest(a: Any, b: Any, loops: list[Any]) -> None:
            if loops:
                number, of_a, of_b, *inner = loops
                with cgutils.for_range(builder, number, intp=INT) as loop:
                    nest(
                        builder.add(a, builder.mul(loop.index, of_a)),
                        builder.add(b, builder.mul(loop.index, of_b)),
                        inner,
                    )
                return
            factor = load_vector(builder, b, vector)
            for k, register in enumerate(registers):
                other = load_vector(builder, builder.add(a, ir.Constant(INT, spacing * k)), vector)
                builder.store(builder.call(fma, [other, factor, builder.load(register)]), register)

        nest(a, b, loops)
        for register, place in zip(registers, places, strict=True):
            store_vector(builder, builder.load(register), place)

    run = make_intrinsic(_LOOPS, body)

    @cfunc(types.void(*[types.int64] * _LOOPS))
    def loops(sums, start, a, b, n0, a0, b0, n1, a1, b1, n2, a2, b2):
        run(sums, start, a, b, n0, a0, b0, n1, a1, b1, n2, a2, b2)

    return loops


_PRODUCTS = 10
"""How many arguments the innermost loops of complex numbers take."""


@cache
def correlate(dtype: torch.dtype, count: int, *, keep: bool) -> Any:
    r"""Return the compiled loops that sum up products of spectra, to be called with `call_correlate`.

    `(sums, start, a, b, n0, a0, b0, n1, a1, b1)` computes `count` complex vectors that lie side by side

    .. math:: \mathrm{sums}_k = \mathrm{start} + \sum_{i,j} a_{i,j,k} \, \overline{b_{i,j}}

    where a moves by a0 and a1 bytes with i < n0 and j < n1, and by one vector with k, and b by b0 and b1. A complex
    vector is one of real parts and one of imaginary parts, side by side. Every vector is loaded for two products.

    Args:
        dtype: what is computed in, float32 or float64.
        count: sums, two registers each.
        keep: whether the sums go on from what is in memory; `start` is not read then.
    """
    vector = ir.VectorType(TYPES[dtype][1], lanes(dtype))
    name = f"llvm.fma.v{lanes(dtype)}f{512 // lanes(dtype)}"

    def body(builder: Any, args: Any) -> None:
        fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector] * 3), name)
        sums, start, a, b, n0, a0, b0, n1, a1, b1 = args
        registers = [cgutils.alloca_once(builder, vector) for _ in range(2 * count)]

        def part(address: Any, index: int) -> Any:
            return builder.add(address, ir.Constant(INT, VECTOR * index))

        first = None if keep else [load_vector(builder, part(start, of), vector) for of in (0, 1)]
        for index, register in enumerate(registers):
            value = first[index % 2] if first else load_vector(builder, part(sums, index), vector)
            builder.store(value, register)
        with (
            cgutils.for_range(builder, n0, intp=INT) as outer,
            cgutils.for_range(builder, n1, intp=INT) as inner,
        ):
            i, j = outer.index, inner.index
            at_a = builder.add(a, builder.add(builder.mul(i, a0), builder.mul(j, a1)))
            at_b = builder.add(b, builder.add(builder.mul(i, b0), builder.mul(j, b1)))
            b_re, b_im = (load_vector(builder, part(at_b, of), vector) for of in (0, 1))
            negative = builder.fneg(b_im)
            for k in range(count):
                a_re, a_im = (load_vector(builder, part(at_a, 2 * k + of), vector) for of in (0, 1))
                for register, one, other in (
                    (registers[2 * k], b_re, b_im),
                    (registers[2 * k + 1], negative, b_re),
                ):
                    total = builder.call(fma, [a_re, one, builder.load(register)])
                    builder.store(builder.call(fma, [a_im, other, total]), register)
        for index, register in enumerate(registers):
            store_vector(builder, builder.load(register), part(sums, index))

    run = make_intrinsic(_PRODUCTS, body)

    @cfunc(types.void(*[types.int64] * _PRODUCTS))
    def loops(sums, start, a, b, n0, a0, b0, n1, a1, b1):
        run(sums, start, a, b, n0, a0, b0, n1, a1, b1)

    return loops


@cache
def call(count: int) -> Any:
    """Return `call(function, ...)`: call a compiled function, given its address and `count` int64 arguments.

    What is called so is compiled once, by itself, and not again into everything that uses it.
    """

    def body(builder: Any, args: Any) -> None:
        function = ir.FunctionType(ir.VoidType(), [INT] * count)
        builder.call(builder.inttoptr(args[0], function.as_pointer()), args[1:])

    return make_intrinsic(count + 1, body)


call_accumulate: Any = call(_LOOPS)
"""Call what `accumulate` returned, given its address and its arguments."""

call_correlate: Any = call(_PRODUCTS)
"""Call what `correlate` returned, given its address and its arguments."""


def _atomic_next(typing, address):
    """Return the int64 at `address` and add one to it, at once for all threads."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", _at(builder, args[0], INT), ir.Constant(INT, 1), "monotonic")

    return types.int64(types.int64), codegen


atomic_next: Any = intrinsic(_atomic_next)


def _as_pointer(typing, address, number):
    """Return an address as a pointer to numbers of a type, for `numba.carray`."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(number.dtype)(types.int64, number), codegen


as_pointer: Any = intrinsic(_as_pointer)


@cache
def _openmp() -> Any:
    """Return the entry point of torch's OpenMP library, or None where it is another than GNU's."""
    try:
        # Only if it is loaded: another copy would bring the second pool of threads.
        entry = ctypes.CDLL("libgomp.so.1", mode=getattr(os, "RTLD_NOLOAD", 0)).GOMP_parallel
    except (OSError, AttributeError):
        return None
    entry.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    entry.restype = None
    return entry


def run_parallel(kernel: Any, arguments: list[int], threads: int) -> None:
    """Call a compiled kernel on several threads at once, each with the same table of arguments.

    Args:
        kernel: a `numba.cfunc` that takes the table's address; element 0 is a counter from which the calls draw
            numbers with `atomic_next`. It must be right however many calls there are.
        arguments: the table from element 1 on.
        threads: how many calls at most.
    """
    table = np.array([0, *arguments], np.int64)
    if threads == 1:
        kernel.ctypes(table.ctypes.data)
    elif (entry := _openmp()) is not None:
        entry(kernel.address, table.ctypes.data, threads, 0)
    else:
        others = [
            threading.Thread(target=kernel.ctypes, args=(table.ctypes.data,)) for _ in range(threads - 1)
        ]
        for thread in others:
            thread.start()
        kernel.ctypes(table.ctypes.data)
        for thread in others:
            thread.join()
