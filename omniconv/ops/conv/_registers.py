"""The innermost loops of the compiled convolutions: neighbouring sums that stay in registers all the while."""

from functools import cache
from typing import Any, Literal

import torch
from llvmlite import ir
from numba import cfunc, types
from numba.core import cgutils

from omniconv.ops._simd import INT, TYPES, call, lanes, load_vector, make_intrinsic, store_vector

_ARGUMENTS = 14


@cache
def make_sums(dtype: torch.dtype, count: int, numbers: Literal["a", "b"]) -> Any:
    r"""Return compiled loops, to be called with `call_sums`, by their address.

    `(sums, pitch, a, apart, b, n0, a0, b0, n1, a1, b1, n2, a2, b2)` computes `count` vectors

    .. math:: \mathrm{sums}_k = \sum_{i,j,l} a_{i,j,l,k} \, b_{i,j,l}

    where a moves by a0, a1 and a2 bytes with i < n0, j < n1 and l < n2, and by `apart` with k, b by b0, b1 and b2, and
    the sums lie `pitch` apart. One of a and b are vectors; the other are numbers, each times all of a vector.

    Args:
        dtype: float32 or float64.
        count: sums, fewer than there are registers.
        numbers: which are numbers.
    """
    vector, number = ir.VectorType(TYPES[dtype][1], lanes(dtype)), TYPES[dtype][1]
    every = ir.Constant(ir.VectorType(ir.IntType(32), lanes(dtype)), None)
    undefined = ir.Constant(vector, ir.Undefined)
    name = f"llvm.fma.v{lanes(dtype)}f{512 // lanes(dtype)}"

    def read(builder: Any, address: Any, operand: str) -> Any:
        if operand != numbers:
            return load_vector(builder, address, vector)
        one = builder.insert_element(
            undefined, load_vector(builder, address, number), ir.Constant(ir.IntType(32), 0)
        )
        return builder.shuffle_vector(one, undefined, every)

    def body(builder: Any, args: Any) -> None:
        fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector] * 3), name)
        sums, pitch, a, apart, b, *loops = args
        registers = [cgutils.alloca_once(builder, vector) for _ in range(count)]
        steps = [builder.mul(apart, ir.Constant(INT, k)) for k in range(count)]
        for register in registers:
            builder.store(ir.Constant(vector, None), register)

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
            factor = read(builder, b, "b")
            for step, register in zip(steps, registers, strict=True):
                other = read(builder, builder.add(a, step), "a")
                builder.store(builder.call(fma, [other, factor, builder.load(register)]), register)

        nest(a, b, loops)
        for k, register in enumerate(registers):
            place = builder.add(sums, builder.mul(pitch, ir.Constant(INT, k)))
            store_vector(builder, builder.load(register), place)

    run = make_intrinsic(_ARGUMENTS, body)

    @cfunc(types.void(*[types.int64] * _ARGUMENTS))
    def loops(sums, pitch, a, apart, b, n0, a0, b0, n1, a1, b1, n2, a2, b2):
        run(sums, pitch, a, apart, b, n0, a0, b0, n1, a1, b1, n2, a2, b2)

    return loops


call_sums: Any = call(_ARGUMENTS)
"""Call what `make_sums` returned, given its address and its arguments."""
